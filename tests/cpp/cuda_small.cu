// Every attention kernel of csrc/cuda in small sizes, without torch or Python: compute-sanitizer's
// tools run over it in seconds. Each tensor is an allocation of its own of exactly its size.
//
//   nvcc -O3 -std=c++17 -lineinfo -arch=sm_90a --cudart=static -Icsrc/cuda
//       csrc/cuda/attention.cu tests/cpp/cuda_small.cu -o cuda_small
//       (-Xcompiler -static-libstdc++,-static-libgcc: for another machine)
//   g++ -O2 -std=c++17 -DG2R_EMULATE -Icsrc/cuda -Itests/cpp -x c++
//       csrc/cuda/attention.cu tests/cpp/cuda_small.cu -o cuda_small
//   compute-sanitizer --tool memcheck ./cuda_small [--uninitialised] [CASE ...]
//
// Outputs start as NaN, or, with --uninitialised, as whatever is there, for initcheck. Every case
// runs twice, must give the same bits, and is held against plain loops in double precision. CASE is
// a part of a case's name. One line a case; the exit status is 1 where one is wrong, 2 where a call
// of CUDA fails.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "attention.h"

#ifndef G2R_EMULATE
#include <cuda_runtime.h>
#endif

namespace cuda_small {

using Ints = std::vector<std::int32_t>;
using Bits = std::vector<std::uint16_t>;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

// -------------------------------------------------------------------------------- device memory

[[noreturn]] void die(const char* what, const char* why) {
    std::printf("FAILED: %s: %s\n", what, why);
    std::exit(2);
}

#ifdef G2R_EMULATE
void* reserve(std::size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes) != 0) die("posix_memalign", "no memory");
    return memory;
}
void release(void* memory) { std::free(memory); }
void fill(void* memory, int value, std::size_t bytes) { std::memset(memory, value, bytes); }
void copy(void* to, const void* from, std::size_t bytes, bool) { std::memcpy(to, from, bytes); }
void synchronize() {}
#else
void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) die(what, cudaGetErrorString(error));
}
void* reserve(std::size_t bytes) {
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes), "cudaMalloc");
    return memory;
}
void release(void* memory) { check_cuda(cudaFree(memory), "cudaFree"); }
void fill(void* memory, int value, std::size_t bytes) {
    check_cuda(cudaMemset(memory, value, bytes), "cudaMemset");
}
void copy(void* to, const void* from, std::size_t bytes, bool to_device) {
    check_cuda(
        cudaMemcpy(to, from, bytes, to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost),
        "cudaMemcpy");
}
void synchronize() {
    check_cuda(cudaGetLastError(), "a launch");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}
#endif

// An allocation of exactly its elements.
template <typename T>
class OnDevice {
 public:
    explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size(), true) {
        copy(memory_, values.data(), bytes(), true);
    }
    OnDevice(std::size_t count, bool uninitialised)
        : count_(count), memory_(reserve(count * sizeof(T))) {
        if (!uninitialised) fill(memory_, 0xff, bytes());  // NaN in every dtype
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    ~OnDevice() { release(memory_); }

    T* data() const { return static_cast<T*>(memory_); }
    std::vector<T> values() const {
        std::vector<T> all(count_);
        copy(all.data(), memory_, bytes(), false);
        return all;
    }

 private:
    std::size_t bytes() const { return count_ * sizeof(T); }

    std::size_t count_;
    void* memory_;
};

// -------------------------------------------------------------------------------------- numbers

enum Dtype { bfloat16, float16 };

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Of a number that the dtype has, and not a subnormal one.
std::uint16_t narrow(Dtype dtype, float value) {
    const std::uint32_t bits = bits_of(value);
    if (dtype == bfloat16) return static_cast<std::uint16_t>(bits >> 16);
    const std::uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    return static_cast<std::uint16_t>(sign | (size == 0 ? 0 : (size - 0x38000000u) >> 13));
}

double widen(Dtype dtype, std::uint16_t bits) {
    if (dtype == bfloat16) {
        const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return static_cast<double>(value);
    }
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const double size = exponent == 31  ? (fraction != 0 ? std::nan("") : HUGE_VAL)
                        : exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(1024 + fraction, exponent - 25);
    return (bits & 0x8000) != 0 ? -size : size;
}

Doubles widen(Dtype dtype, const Bits& bits) {
    Doubles values(bits.size());
    std::transform(bits.begin(), bits.end(), values.begin(),
                   [dtype](std::uint16_t x) { return widen(dtype, x); });
    return values;
}

// Uniform in (-2 scale, 2 scale), every bit of the dtype's fraction in use; scale is a power of 2.
Bits random_numbers(Dtype dtype, std::size_t count, float scale, std::mt19937_64& random) {
    const int limit = dtype == bfloat16 ? 256 : 2048;
    Bits made(count);
    for (std::uint16_t& x : made) {
        const auto steps = static_cast<int>(random() % static_cast<unsigned>(2 * limit - 1));
        const auto value = static_cast<float>(steps - limit + 1);
        x = narrow(dtype, scale * 2.0f * value / static_cast<float>(limit));
    }
    return made;
}

// --------------------------------------------------------------------------------------- tables

struct Segment {
    int parent, tokens;
    std::vector<int> lanes;  // none: nothing goes back
    int start = 0, key = 0;  // position, row of k and v
    int query = 0;           // row of q
    int back = 0;            // row of grad_out and dq
    int key_back = 0;        // row of dk and dv
};

struct Trie {
    std::vector<Segment> segments;
    int rows = 0, back_rows = 0, lanes = 0;  // of keys as of queries; of gradients
    Ints table, positions;
};

// A prompt, two responses with two tails each, and a chain of segments of one token. No two of the
// orders of rows are the same.
Trie make_trie() {
    Trie trie;
    auto& all = trie.segments;
    all = {{-1, 150, {}}, {0, 70, {0, 1}}, {0, 133, {2, 3}}, {1, 20, {0}},
           {1, 9, {1}},   {2, 20, {2}},    {2, 9, {3}}};
    for (int i = 0; i < 37; ++i) {
        const int parent = i == 0 ? 0 : static_cast<int>(all.size()) - 1;
        all.push_back({parent, 1, i < 20 ? std::vector<int>{4, 5} : std::vector<int>{4}});
    }
    trie.lanes = 6;
    for (Segment& s : all) {
        s.start = s.parent < 0 ? 0
                               : all[static_cast<std::size_t>(s.parent)].start +
                                     all[static_cast<std::size_t>(s.parent)].tokens;
        s.key = trie.rows;
        trie.rows += s.tokens;
        s.key_back = trie.back_rows;
        trie.back_rows += s.tokens * static_cast<int>(s.lanes.size());
    }
    int query = 0, back = 0;
    for (auto s = all.rbegin(); s != all.rend(); ++s) {
        s->query = query;
        s->back = back;
        query += s->tokens;
        back += s->tokens * static_cast<int>(s->lanes.size());
    }
    trie.positions.resize(static_cast<std::size_t>(trie.rows));
    for (const Segment& s : all) {
        trie.table.insert(trie.table.end(), {s.start, s.start + s.tokens, s.key, s.parent});
        std::iota(trie.positions.begin() + s.query, trie.positions.begin() + s.query + s.tokens,
                  s.start);
    }
    return trie;
}

// See g2r_fast/device_tables.py.
struct Tables {
    Ints tiles, entries, query_tiles, keys, key_tiles;
};

int tiles_of(int rows, int step) { return (rows + step - 1) / step; }

// Rows of `columns` numbers behind their cost, the most expensive first; without the cost.
Ints costly_first(std::vector<Ints> rows) {
    std::stable_sort(rows.begin(), rows.end(),
                     [](const Ints& a, const Ints& b) { return a[0] > b[0]; });
    Ints flat;
    for (const Ints& row : rows) flat.insert(flat.end(), row.begin() + 1, row.end());
    return flat;
}

Tables make_tables(const Trie& trie, int group, const G2rTileSizes& sizes) {
    const auto number = [](std::size_t n) { return static_cast<int>(n); };
    const auto last_position = [&](const Segment& s, int tile, int step) {
        return s.start + std::min(((tile + 1) * step - 1) / group, s.tokens - 1);
    };
    Tables made;
    std::vector<Ints> tiles, query_tiles, key_tiles;
    std::vector<int> first_entry, owner;
    for (int i = 0; i < number(trie.segments.size()); ++i) {
        const Segment& s = trie.segments[static_cast<std::size_t>(i)];
        for (int t = 0; t < tiles_of(s.tokens * group, sizes.forward_rows); ++t) {
            tiles.push_back({last_position(s, t, sizes.forward_rows), i, s.query, s.tokens, t});
        }
    }
    for (int lane = 0; lane < trie.lanes; ++lane) {
        first_entry.push_back(number(owner.size()));
        // Parents stand in front of their children: by position.
        for (int i = 0; i < number(trie.segments.size()); ++i) {
            const Segment& s = trie.segments[static_cast<std::size_t>(i)];
            const auto place = std::find(s.lanes.begin(), s.lanes.end(), lane);
            if (place == s.lanes.end()) continue;
            const int at = number(owner.size()), stride = number(s.lanes.size());
            const int first = s.back + static_cast<int>(place - s.lanes.begin());
            made.entries.insert(made.entries.end(), {i, s.query, s.tokens, first, stride, lane});
            for (int t = 0; t < tiles_of(s.tokens * group, sizes.backward_rows); ++t) {
                query_tiles.push_back({last_position(s, t, sizes.backward_rows), at, t});
            }
            owner.push_back(i);
        }
    }
    first_entry.push_back(number(owner.size()));
    for (const Segment& s : trie.segments) {
        for (std::size_t place = 0; place < s.lanes.size(); ++place) {
            const auto lane = static_cast<std::size_t>(s.lanes[place]);
            const int last = first_entry[lane + 1];
            int first = first_entry[lane], behind = 0;
            const auto of = [&](int entry) -> const Segment& {
                return trie
                    .segments[static_cast<std::size_t>(owner[static_cast<std::size_t>(entry)])];
            };
            while (first < last && of(first).start < s.start) ++first;
            for (int entry = first; entry < last; ++entry) behind += of(entry).tokens;
            const int at = number(made.keys.size()) / 7;
            made.keys.insert(made.keys.end(), {s.key, s.start, s.tokens, s.key_back + number(place),
                                               number(s.lanes.size()), first, last});
            for (int t = 0; t < tiles_of(s.tokens, sizes.backward_keys); ++t) {
                key_tiles.push_back({behind - t * sizes.backward_keys, at, t});
            }
        }
    }
    made.tiles = costly_first(tiles);
    made.query_tiles = costly_first(query_tiles);
    made.key_tiles = costly_first(key_tiles);
    return made;
}

// ---------------------------------------------------------------------------------------- cases

struct Case {
    Dtype dtype;
    int head_dim, heads, kv_heads;
    G2rProducts products;
    int window;     // 0: none
    float softcap;  // 0: none

    std::string name() const {
        return std::string(dtype == bfloat16 ? "bf16" : "f16") + "-dim" + std::to_string(head_dim) +
               "-group" + std::to_string(heads / kv_heads) +
               (products == G2R_WGMMA ? "-wgmma" : "-mma") +
               (window != 0 ? "-window" + std::to_string(window) : "") +
               (softcap != 0.0f ? "-softcap" : "");
    }
    int group() const { return heads / kv_heads; }
};

struct Inputs {
    Bits q, k, v, grad_out;
};

struct Outputs {
    Bits out, dq;
    Floats lse, delta, dk, dv;

    bool operator==(const Outputs& other) const {
        const auto same = [](const Floats& a, const Floats& b) {
            return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
        };
        return out == other.out && dq == other.dq && same(lse, other.lse) &&
               same(delta, other.delta) && same(dk, other.dk) && same(dv, other.dv);
    }
};

struct Truth {
    Doubles out, lse, delta, dq, dk, dv;
};

// Of `dim` numbers; in eight sums, which a compiler keeps in vectors.
double dot(const double* a, const double* b, int dim) {
    double sums[8] = {};
    for (int d = 0; d < dim; d += 8) {
        for (int i = 0; i < 8; ++i) sums[i] += a[d + i] * b[d + i];
    }
    return std::accumulate(sums, sums + 8, 0.0);
}

void add(double* to, double factor, const double* from, int dim) {
    for (int d = 0; d < dim; ++d) to[d] += factor * from[d];
}

// One query head of it; dk and dv of this head alone.
void true_head(const Case& c, const Trie& trie, const Doubles& q, const Doubles& k,
               const Doubles& v, const Doubles& grad_out, int head, Truth& truth, Doubles& dk,
               Doubles& dv) {
    const int dim = c.head_dim, kv_head = head / c.group();
    const auto at = [dim](int row, int heads, int of) {
        return (static_cast<std::size_t>(row) * static_cast<std::size_t>(heads) +
                static_cast<std::size_t>(of)) *
               static_cast<std::size_t>(dim);
    };
    struct Key {
        int segment, token;
        double score, slope, p;  // slope: of the cap
    };
    std::vector<Key> seen;
    for (int i = 0; i < static_cast<int>(trie.segments.size()); ++i) {
        const Segment& s = trie.segments[static_cast<std::size_t>(i)];
        for (int t = 0; t < s.tokens; ++t) {
            const double* const query = &q[at(s.query + t, c.heads, head)];
            const int lowest = c.window == 0 ? 0 : std::max(0, s.start + t - c.window + 1);
            seen.clear();
            double highest = -HUGE_VAL, sum = 0.0;
            for (int a = i, last = t; a >= 0;) {
                const Segment& on_path = trie.segments[static_cast<std::size_t>(a)];
                for (int u = last; u >= 0 && on_path.start + u >= lowest; --u) {
                    double score = dot(query, &k[at(on_path.key + u, c.kv_heads, kv_head)], dim);
                    double slope = 1.0;
                    if (c.softcap != 0.0f) {
                        const double share = std::tanh(score / static_cast<double>(c.softcap));
                        score = static_cast<double>(c.softcap) * share;
                        slope = 1.0 - share * share;
                    }
                    seen.push_back({a, u, score, slope, 0.0});
                    highest = std::max(highest, score);
                }
                a = on_path.parent;
                if (a >= 0) last = trie.segments[static_cast<std::size_t>(a)].tokens - 1;
            }
            for (const Key& key : seen) sum += std::exp(key.score - highest);
            const auto row = static_cast<std::size_t>((s.query + t) * c.heads + head);
            truth.lse[row] = highest + std::log(sum);
            double* const out = &truth.out[at(s.query + t, c.heads, head)];
            for (Key& key : seen) {
                key.p = std::exp(key.score - truth.lse[row]);
                const int from = trie.segments[static_cast<std::size_t>(key.segment)].key;
                add(out, key.p, &v[at(from + key.token, c.kv_heads, kv_head)], dim);
            }
            const int stride = static_cast<int>(s.lanes.size());
            for (int place = 0; place < stride; ++place) {
                const int back = s.back + t * stride + place;
                const int lane = s.lanes[static_cast<std::size_t>(place)];
                const double* const grad = &grad_out[at(back, c.heads, head)];
                const double delta = dot(grad, out, dim);
                truth.delta[static_cast<std::size_t>(back * c.heads + head)] = delta;
                double* const dq = &truth.dq[at(back, c.heads, head)];
                for (const Key& key : seen) {
                    const Segment& of = trie.segments[static_cast<std::size_t>(key.segment)];
                    const std::size_t from = at(of.key + key.token, c.kv_heads, kv_head);
                    const double dp = dot(grad, &v[from], dim);
                    const double ds = key.p * (dp - delta) * key.slope;
                    add(dq, ds, &k[from], dim);
                    const auto found = std::find(of.lanes.begin(), of.lanes.end(), lane);
                    if (found == of.lanes.end()) continue;
                    const int row_back = of.key_back +
                                         key.token * static_cast<int>(of.lanes.size()) +
                                         static_cast<int>(found - of.lanes.begin());
                    add(&dk[at(row_back, 1, 0)], ds, query, dim);
                    add(&dv[at(row_back, 1, 0)], key.p, grad, dim);
                }
            }
        }
    }
}

Truth true_outputs(const Case& c, const Trie& trie, const Inputs& inputs) {
    const auto size = [&](int rows, int heads, int dim) {
        return static_cast<std::size_t>(rows * heads * dim);
    };
    const Doubles q = widen(c.dtype, inputs.q), k = widen(c.dtype, inputs.k);
    const Doubles v = widen(c.dtype, inputs.v), grad_out = widen(c.dtype, inputs.grad_out);
    Truth truth{Doubles(size(trie.rows, c.heads, c.head_dim)),
                Doubles(size(trie.rows, c.heads, 1)),
                Doubles(size(trie.back_rows, c.heads, 1)),
                Doubles(size(trie.back_rows, c.heads, c.head_dim)),
                Doubles(size(trie.back_rows, c.kv_heads, c.head_dim)),
                Doubles(size(trie.back_rows, c.kv_heads, c.head_dim))};
    const auto heads = static_cast<std::size_t>(c.heads);
    const Doubles zeros(size(trie.back_rows, 1, c.head_dim));
    std::vector<Doubles> dk(heads, zeros), dv(heads, zeros);
    std::vector<std::thread> threads;
    for (std::size_t head = 0; head < heads; ++head) {
        threads.emplace_back([&, head] {
            true_head(c, trie, q, k, v, grad_out, static_cast<int>(head), truth, dk[head],
                      dv[head]);
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (int head = 0; head < c.heads; ++head) {
        for (int row = 0; row < trie.back_rows; ++row) {
            const std::size_t to = size(row * c.kv_heads + head / c.group(), 1, c.head_dim);
            const std::size_t from = size(row, 1, c.head_dim);
            add(&truth.dk[to], 1.0, &dk[static_cast<std::size_t>(head)][from], c.head_dim);
            add(&truth.dv[to], 1.0, &dv[static_cast<std::size_t>(head)][from], c.head_dim);
        }
    }
    return truth;
}

void check_call(int error, const char* what) {
    if (error != 0) die(what, g2r_error(error));
}

Outputs run(const Case& c, const Trie& trie, const Tables& host, const Inputs& inputs,
            bool uninitialised) {
    const auto size = [&](int rows, int heads, int dim) {
        return static_cast<std::size_t>(rows * heads * dim);
    };
    const OnDevice<std::uint16_t> q(inputs.q), k(inputs.k), v(inputs.v), grad_out(inputs.grad_out);
    const OnDevice<std::int32_t> segments(trie.table), positions(trie.positions);
    const OnDevice<std::int32_t> tiles(host.tiles), entries(host.entries);
    const OnDevice<std::int32_t> query_tiles(host.query_tiles), keys(host.keys);
    const OnDevice<std::int32_t> key_tiles(host.key_tiles);
    const OnDevice<std::uint16_t> out(size(trie.rows, c.heads, c.head_dim), uninitialised);
    const OnDevice<std::uint16_t> dq(size(trie.back_rows, c.heads, c.head_dim), uninitialised);
    const OnDevice<float> lse(size(trie.rows, c.heads, 1), uninitialised);
    const OnDevice<float> delta(size(trie.back_rows, c.heads, 1), uninitialised);
    const OnDevice<float> dk(size(trie.back_rows, c.kv_heads, c.head_dim), uninitialised);
    const OnDevice<float> dv(size(trie.back_rows, c.kv_heads, c.head_dim), uninitialised);

    G2rAttentionForward forward{};
    forward.q = q.data();
    forward.k = k.data();
    forward.v = v.data();
    forward.out = out.data();
    forward.lse = lse.data();
    forward.segments = segments.data();
    forward.positions = positions.data();
    forward.tiles = tiles.data();
    forward.queries = forward.keys = trie.rows;
    forward.tile_count = static_cast<int>(host.tiles.size() / 4);
    forward.heads = c.heads;
    forward.kv_heads = c.kv_heads;
    forward.head_dim = c.head_dim;
    forward.dtype = c.dtype;
    forward.products = c.products;
    forward.window = c.window != 0 ? c.window : INT32_MAX;
    forward.softcap = c.softcap;
    check_call(g2r_attention_forward(&forward, nullptr), "g2r_attention_forward");
    synchronize();

    G2rAttentionBackward backward{};
    backward.q = q.data();
    backward.k = k.data();
    backward.v = v.data();
    backward.out = out.data();
    backward.lse = lse.data();
    backward.grad_out = grad_out.data();
    backward.dq = dq.data();
    backward.dk = dk.data();
    backward.dv = dv.data();
    backward.delta = delta.data();
    backward.segments = segments.data();
    backward.positions = positions.data();
    backward.entries = entries.data();
    backward.query_tiles = query_tiles.data();
    backward.key_runs = keys.data();
    backward.key_tiles = key_tiles.data();
    backward.queries = backward.keys = trie.rows;
    backward.rows = backward.key_rows = trie.back_rows;
    backward.query_tile_count = static_cast<int>(host.query_tiles.size() / 2);
    backward.key_tile_count = static_cast<int>(host.key_tiles.size() / 2);
    backward.heads = c.heads;
    backward.kv_heads = c.kv_heads;
    backward.head_dim = c.head_dim;
    backward.dtype = c.dtype;
    backward.products = c.products;
    backward.window = forward.window;
    backward.softcap = c.softcap;
    check_call(g2r_attention_backward(&backward, nullptr), "g2r_attention_backward");
    synchronize();
    return {out.values(), dq.values(), lse.values(), delta.values(), dk.values(), dv.values()};
}

// The relative error in the norm; infinite where anything is not finite.
double error_of(const Doubles& found, const Doubles& truth) {
    double difference = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < truth.size(); ++i) {
        if (!std::isfinite(found[i])) return HUGE_VAL;
        difference += (found[i] - truth[i]) * (found[i] - truth[i]);
        norm += truth[i] * truth[i];
    }
    return std::sqrt(difference / norm);
}

// Whether everything is right.
bool run_case(const Case& c, const Trie& trie, bool uninitialised) {
    G2rTileSizes sizes;
    check_call(g2r_tile_sizes(c.head_dim, c.products, &sizes), "g2r_tile_sizes");
    const Tables tables = make_tables(trie, c.group(), sizes);
    std::mt19937_64 random(7);
    const auto numbers = [&](int rows, int heads, float scale) {
        return random_numbers(c.dtype, static_cast<std::size_t>(rows * heads * c.head_dim), scale,
                              random);
    };
    const float scale = c.head_dim == 64 ? 0.125f : 0.0625f;  // scores of scale 1
    Inputs inputs;
    inputs.q = numbers(trie.rows, c.heads, scale);
    inputs.k = numbers(trie.rows, c.kv_heads, 1.0f);
    inputs.v = numbers(trie.rows, c.kv_heads, 1.0f);
    inputs.grad_out = numbers(trie.back_rows, c.heads, 1.0f);

    const Outputs found = run(c, trie, tables, inputs, uninitialised);
    const bool same = found == run(c, trie, tables, inputs, uninitialised);
    const Truth truth = true_outputs(c, trie, inputs);
    const auto floats = [](const Floats& x) { return Doubles(x.begin(), x.end()); };
    const std::pair<const char*, double> errors[] = {
        {"out", error_of(widen(c.dtype, found.out), truth.out)},
        {"lse", error_of(floats(found.lse), truth.lse)},
        {"delta", error_of(floats(found.delta), truth.delta)},
        {"dq", error_of(widen(c.dtype, found.dq), truth.dq)},
        {"dk", error_of(floats(found.dk), truth.dk)},
        {"dv", error_of(floats(found.dv), truth.dv)},
    };
    const double rounding = c.dtype == bfloat16 ? 1e-2 : 2e-3;
    bool right = same;
    std::printf("%-42s", c.name().c_str());
    for (const auto& [name, error] : errors) {
        // Nothing on the way to lse is rounded to the dtype.
        right = right && error < (std::strcmp(name, "lse") == 0 ? 1e-5 : rounding);
        std::printf(" %s %.1e", name, error);
    }
    std::printf("%s %s\n", same ? "" : ", other bits when run again:", right ? "right" : "WRONG");
    std::fflush(stdout);
    return right;
}

// Whether the device has code of the warpgroups' products.
bool has_warpgroups() {
#ifdef G2R_EMULATE
    return true;
#else
    int major = 0, minor = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "major");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "minor");
    return major == 9 && minor == 0;
#endif
}

// Those of one dtype behind each other.
std::vector<Case> all_cases() {
    std::vector<G2rProducts> kinds = {G2R_MMA};
    if (has_warpgroups()) kinds.push_back(G2R_WGMMA);
    std::vector<Case> cases;
    for (const Dtype dtype : {bfloat16, float16}) {
        for (const G2rProducts products : kinds) {
            for (const int head_dim : {64, 128}) {
                for (const int group : {1, 6}) {
                    const int kv_heads = group == 6 && head_dim == 128 ? 1 : 2;
                    for (const int window : {0, 77}) {
                        for (const float softcap : {0.0f, 1.5f}) {
                            cases.push_back({dtype, head_dim, group * kv_heads, kv_heads, products,
                                             window, softcap});
                        }
                    }
                }
            }
        }
    }
    return cases;
}

int main_of(const std::vector<std::string>& words) {
    bool uninitialised = false;
    std::vector<std::string> chosen;
    for (const std::string& word : words) {
        if (word == "--uninitialised") {
            uninitialised = true;
        } else {
            chosen.push_back(word);
        }
    }
    check_call(g2r_probe(), "g2r_probe");
    const Trie trie = make_trie();
    int ran = 0, wrong = 0;
    for (const Case& c : all_cases()) {
        const std::string name = c.name();
        const auto in_name = [&name](const std::string& part) {
            return name.find(part) != std::string::npos;
        };
        if (!chosen.empty() && std::none_of(chosen.begin(), chosen.end(), in_name)) continue;
        ++ran;
        wrong += run_case(c, trie, uninitialised) ? 0 : 1;
    }
    std::printf("%d cases on a %s, %d wrong\n", ran, g2r_device(), wrong);
    return ran == 0 || wrong != 0 ? 1 : 0;
}

}  // namespace cuda_small

int main(int count, char** words) { return cuda_small::main_of({words + 1, words + count}); }
