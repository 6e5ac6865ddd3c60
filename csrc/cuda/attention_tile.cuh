// What the attention kernels share: tiles of rows in shared memory, products of tiles, and the walk
// from a segment to the root.
//
// A block has four warps, and each warp owns 16 * m_tiles rows of the block's tile. Fragments of
// results, [m_tiles][n_tiles][4], are those of mma_16x8x16: element [m][n][c] lies in row
// 16 m + lane / 4 + 8 (c / 2) of the warp and in column 8 n + 2 (lane % 4) + c % 2.
#pragma once

#include "device.cuh"

namespace g2r::gpu {

constexpr int attention_threads = 128;
constexpr float log2_e = 1.4426950408889634f;

// A row is head_dim elements of 16 bits; its chunk c of 16 bytes lies at place c ^ (row % 8), so
// that eight rows of one chunk touch every bank once.
template <int head_dim>
constexpr int row_bytes = head_dim * 2;

template <int head_dim>
G2R_DEVICE int swizzled(int row, int chunk) {
    return row * row_bytes<head_dim> + ((chunk ^ (row & 7)) << 4);
}

// The same number, about which the compiler knows nothing. Of sums whose bits do not overlap it
// makes logical operations, and then they are no immediates of a load.
G2R_DEVICE int opaque(int x) {
    asm("" : "+r"(x));
    return x;
}

// The same number, and whatever follows from it is computed here, not kept in registers from before
// a loop.
G2R_DEVICE int computed_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Where a lane's row of ldmatrix_x4 starts within 16 rows, for each pair of chunks.
struct LanePlaces {
    int at[4];

    G2R_DEVICE int operator[](int pair) const { return at[pair & 3] + (pair >> 2) * 128; }
};

template <int head_dim>
G2R_DEVICE int wide_place() {  // matrices by (row, chunk): 0 0, 8 0, 0 1, 8 1
    const int lane = lane_index();
    return opaque(swizzled<head_dim>(lane & 15, lane >> 4));
}
template <int head_dim>
G2R_DEVICE int tall_place() {  // 0 0, 0 1, 8 0, 8 1
    const int lane = lane_index();
    return opaque(swizzled<head_dim>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
}

// The places of a lane for left, right and transposed right factors. Which registers ptxas spills
// is a matter of luck; of these two, each kernel takes the one with which it spills none.
template <int head_dim>
class KeptLanes {  // eight registers
 public:
    G2R_DEVICE KeptLanes() {
        const int wide = wide_place<head_dim>(), tall = tall_place<head_dim>();
        G2R_UNROLL
        for (int j = 0; j < 4; ++j) {
            wide_.at[j] = opaque(wide ^ (j << 5));
            tall_.at[j] = opaque(tall ^ (j << 5));
        }
    }

    G2R_DEVICE LanePlaces left() const {
        LanePlaces here;
        G2R_UNROLL
        for (int j = 0; j < 4; ++j) here.at[j] = computed_here(wide_.at[j]);
        return here;
    }
    G2R_DEVICE LanePlaces right() const { return tall_; }
    G2R_DEVICE LanePlaces transposed() const { return wide_; }

 private:
    LanePlaces wide_, tall_;
};

template <int head_dim>
class ComputedLanes {  // two registers, and the others where they are used
 public:
    G2R_DEVICE ComputedLanes() : wide_(wide_place<head_dim>()), tall_(tall_place<head_dim>()) {}

    G2R_DEVICE LanePlaces left() const { return places(wide_); }
    G2R_DEVICE LanePlaces right() const { return places(tall_); }
    G2R_DEVICE LanePlaces transposed() const { return places(wide_); }

 private:
    G2R_DEVICE static LanePlaces places(int first) {
        const int here = computed_here(first);
        LanePlaces found;
        G2R_UNROLL
        for (int j = 0; j < 4; ++j) found.at[j] = opaque(here ^ (j << 5));
        return found;
    }

    int wide_, tall_;
};

// The first of a thread's rows in the block's tile.
template <int m_tiles>
G2R_DEVICE int row_of_thread() {
    const int thread = computed_here(thread_index());
    return (thread >> 5) * m_tiles * 16 + ((thread & 31) >> 2);
}

// Starts copying rows index[0..rows) of a matrix of head_dim columns whose rows lie `stride` bytes
// apart.
template <int head_dim, int rows>
G2R_DEVICE void copy_rows(char* to, const void* from, const int* index, int stride) {
    constexpr int chunks = head_dim / 8, step = attention_threads / chunks;
    static_assert(step % 8 == 0 && rows % step == 0);
    const int thread = computed_here(thread_index());
    const int row = thread / chunks, chunk = thread % chunks;
    const char* const base = static_cast<const char*>(from) + chunk * 16;
    char* const target = to + opaque(swizzled<head_dim>(row, chunk));
    G2R_UNROLL
    for (int i = 0; i < rows; i += step) {
        const std::uint64_t offset =
            static_cast<std::uint64_t>(static_cast<std::uint32_t>(index[row + i])) *
            static_cast<std::uint32_t>(stride);
        cp_async_16(target + i * row_bytes<head_dim>, base + offset, true);
    }
}

// The same for rows that follow each other, `first` up to `last`, which is repeated.
template <int head_dim, int rows>
G2R_DEVICE void copy_run(char* to, const void* from, int first, int last, int stride) {
    constexpr int chunks = head_dim / 8, step = attention_threads / chunks;
    const int row = thread_index() / chunks, chunk = thread_index() % chunks;
    const char* const base = static_cast<const char*>(from) + chunk * 16;
    G2R_UNROLL
    for (int i = row; i < rows; i += step) {
        const std::int64_t at = min(first + i, last);
        cp_async_16(to + swizzled<head_dim>(i, chunk), base + at * stride, true);
    }
}

template <int m_tiles, int n_tiles>
G2R_DEVICE void set_zero(float (&d)[m_tiles][n_tiles][4]) {
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int n = 0; n < n_tiles; ++n) {
            G2R_UNROLL
            for (int c = 0; c < 4; ++c) d[m][n][c] = 0.0f;
        }
    }
}

// d += a bT: rows of a and b, both in shared memory, sums over head_dim.
template <typename T, int head_dim, int m_tiles, int n_tiles, typename Lanes>
G2R_DEVICE void product_nt(float (&d)[m_tiles][n_tiles][4], const char* a, const char* b,
                           const Lanes& lanes) {
    constexpr int bytes = row_bytes<head_dim>;
    const LanePlaces left_at = lanes.left(), right_at = lanes.right();
    G2R_UNROLL
    for (int k = 0; k < head_dim / 16; ++k) {
        std::uint32_t left[m_tiles][4];
        G2R_UNROLL
        for (int m = 0; m < m_tiles; ++m) {
            ldmatrix_x4(left[m], a + left_at[k] + m * 16 * bytes);
        }
        G2R_UNROLL
        for (int n = 0; n < n_tiles; n += 2) {
            std::uint32_t right[4];
            ldmatrix_x4(right, b + right_at[k] + n * 8 * bytes);
            G2R_UNROLL
            for (int m = 0; m < m_tiles; ++m) {
                mma_16x8x16<T>(d[m][n], left[m], right[0], right[1]);
                mma_16x8x16<T>(d[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// d += a b: a from registers, rounded to T; rows of b, one for each column of a, in shared memory.
template <typename T, int head_dim, int m_tiles, int n_tiles, typename Lanes>
G2R_DEVICE void product_nn(float (&d)[m_tiles][head_dim / 8][4],
                           const float (&a)[m_tiles][n_tiles][4], const char* b,
                           const Lanes& lanes) {
    constexpr int bytes = row_bytes<head_dim>;
    const LanePlaces right_at = lanes.transposed();
    G2R_UNROLL
    for (int k = 0; k < n_tiles / 2; ++k) {
        std::uint32_t left[m_tiles][4];
        G2R_UNROLL
        for (int m = 0; m < m_tiles; ++m) {
            left[m][0] = pack<T>(a[m][2 * k][0], a[m][2 * k][1]);
            left[m][1] = pack<T>(a[m][2 * k][2], a[m][2 * k][3]);
            left[m][2] = pack<T>(a[m][2 * k + 1][0], a[m][2 * k + 1][1]);
            left[m][3] = pack<T>(a[m][2 * k + 1][2], a[m][2 * k + 1][3]);
        }
        G2R_UNROLL
        for (int n = 0; n < head_dim / 16; ++n) {
            std::uint32_t right[4];
            ldmatrix_x4_transposed(right, b + right_at[n] + k * 16 * bytes);
            G2R_UNROLL
            for (int m = 0; m < m_tiles; ++m) {
                mma_16x8x16<T>(d[m][2 * n], left[m], right[0], right[1]);
                mma_16x8x16<T>(d[m][2 * n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// Writes rows of a warp, rounded to T, to index[row] * head_dim for each row whose index is not
// negative. `staging`: the warp's own rows of a tile in shared memory, which nobody else reads.
template <typename T, int head_dim, int m_tiles>
G2R_DEVICE void store_rows(T* to, const int (&index)[m_tiles][2],
                           const float (&d)[m_tiles][head_dim / 8][4], char* staging) {
    constexpr int chunks = head_dim / 8, step = 32 / chunks;
    const int lane = computed_here(thread_index()) & 31;
    sync_warp();
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = m * 16 + half * 8 + lane / 4;
            G2R_UNROLL
            for (int n = 0; n < chunks; ++n) {
                *reinterpret_cast<std::uint32_t*>(staging + swizzled<head_dim>(row, n) +
                                                  (lane & 3) * 4) =
                    pack<T>(d[m][n][half * 2], d[m][n][half * 2 + 1]);
            }
        }
    }
    sync_warp();
    const int chunk = lane % chunks;
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            G2R_UNROLL
            for (int i = 0; i < 8; i += step) {
                const int row = i + lane / chunks;
                const int at = shuffle(index[m][half], row * 4);
                if (at < 0) continue;
                store_16(to + static_cast<std::int64_t>(at) * head_dim + chunk * 8,
                         load_16(staging + swizzled<head_dim>(m * 16 + half * 8 + row, chunk)));
            }
        }
    }
}

// Two numbers to an address aligned to 8.
G2R_DEVICE void store_8(float* to, float first, float second) {
    struct alignas(8) Pair {
        float first, second;
    };
    *reinterpret_cast<Pair*>(to) = {first, second};
}

// From a segment to the root: rows of k and v by descending position. It holds one register, and
// reads the segment again each time.
class PathWalk {
 public:
    G2R_DEVICE explicit PathWalk(int segment) : segment_(segment) {}

    // The row of a position of the path, of position 0 for those below; to be asked for ever lower
    // ones.
    G2R_DEVICE int row(const std::int32_t* segments, int position) {
        position = max(position, 0);
        Words words = load_16(segments + static_cast<std::int64_t>(segment_) * 4);
        while (position < static_cast<int>(words.word[0])) {
            segment_ = static_cast<int>(words.word[3]);
            words = load_16(segments + static_cast<std::int64_t>(segment_) * 4);
        }
        return static_cast<int>(words.word[2]) + position - static_cast<int>(words.word[0]);
    }

 private:
    int segment_;
};

}  // namespace g2r::gpu
