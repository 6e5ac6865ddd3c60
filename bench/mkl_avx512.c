/* Lets MKL take its AVX-512 path on a processor of another vendor; see README.md, "MKL on AMD".
 *     gcc -shared -fPIC -o /tmp/mkl_avx512.so bench/mkl_avx512.c
 *     LD_PRELOAD=/tmp/mkl_avx512.so python -m bench.harness ...
 * The results file records what was preloaded. */
int mkl_serv_intel_cpu_true(void) { return 1; }
int mkl_serv_intel_cpu(void) { return 1; }
