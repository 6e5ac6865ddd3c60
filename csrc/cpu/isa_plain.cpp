// Any processor: four numbers a vector, as SSE2 and NEON have them.
#include <math.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

#define G2R_NS plain
#define G2R_WIDTH 4
#define G2R_VECTORS 2
#define G2R_BF16 0
#include "table.h"

namespace g2r {
const Kernels& plain_kernels() { return plain::table("plain"); }
}  // namespace g2r
