// Products with weights: rows meet packed slices, and finished tiles go to an epilogue.
#pragma once

#include "pack.h"

namespace g2r::G2R_NS {

// Depth of one step of a product: a slice and six rows stay in the nearest caches.
constexpr i64 kDepth = 1024;
// Rows that one task takes through a slice: many, for what packing it costs. They are more than the
// second-level cache holds, and come from behind it one tile ahead of their use.
constexpr i64 kTaskRows = 1008;
// Where there are too few tasks for the threads, a task takes fewer rows, but not fewer than these.
constexpr i64 kFewestTaskRows = 126;

// The fewest rows that one thread takes through all the products of a stage by itself.
constexpr i64 kFewestOwnRows = 252;

// Rows to be multiplied: number k of a row is data[row * ld + k].
template <class T>
struct Rows {
    const T* data;
    i64 ld;
};

// task(panel, row, rows) for pieces that together are all rows and panels.
template <class Task>
void each_piece(i64 rows, i64 panels, const Task& task) {
    if (rows == 0 || panels == 0) return;
    const i64 threads = is_alone() ? 1 : pool().threads();
    const i64 wanted = larger(ceil_div(rows, kTaskRows), ceil_div(3 * threads, panels));
    const i64 most = ceil_div(rows, smaller(wanted, ceil_div(rows, kFewestTaskRows)));
    const i64 task_rows = round_up(most, kRows), blocks = ceil_div(rows, task_rows);
    parallel(blocks * panels, [&](i64 index) {
        const i64 row = index % blocks * task_rows;
        task(index / blocks, row, smaller(task_rows, rows - row));
    });
}

// use(k, depth, left, right) for every slice of a panel: its place, and what is multiplied of rows
// from `row` on.
template <class T, class Weight, class Use>
void each_slice(const Rows<T>& a, i64 row, const Weight& weight, i64 panel, const Use& use) {
    const Array<T> own(weight.packed == nullptr ? kDepth * kPanel : 0);
    for (i64 k = 0; k < weight.depth(); k += kDepth) {
        const i64 depth = smaller(kDepth, weight.depth() - k);
        const T* slice = own;
        if (weight.packed == nullptr)
            weight.pack(own, panel, k, depth);
        else
            slice = weight.packed + (panel * weight.depth() + k) * kPanel;
        use(k, depth, Operand<T>{a.data + row * a.ld + k, a.ld, Pair<T>::size},
            Panel<T>{slice, kPanel * Pair<T>::size});
    }
}

// How many numbers the packed slices of a weight are.
inline i64 packed_size(i64 columns, i64 depth) { return round_up(columns, kPanel) * depth; }

// Room for a stage's weights that are packed once for all its chunks of rows, instead of once for
// each: where there are chunks enough, and the weights stay in the last-level cache.
template <class T>
class PackedAhead {
 public:
    PackedAhead(i64 rows, i64 size)
        : memory_(rows > kManyRows && size * i64(sizeof(T)) <= kMostBytes ? size : 0) {}

    // For `packed` of the weight whose slices begin at number `at`; null: no room.
    T* from(i64 at) const { return memory_.size() > 0 ? memory_ + at : nullptr; }
    // How many rows a chunk then takes: fewer, as each costs no packing.
    i64 chunk_rows() const { return memory_.size() > 0 ? kTaskRows / 2 : kTaskRows; }

 private:
    static constexpr i64 kManyRows = 3 * kTaskRows, kMostBytes = i64(16) << 20;
    Array<T> memory_;
};

// Packs a weight that has room for it.
template <class Weight>
void pack_ahead(const Weight& weight) {
    if (weight.packed == nullptr) return;
    parallel(ceil_div(weight.columns(), kPanel), [&](i64 panel) {
        weight.pack(weight.packed + panel * kPanel * weight.depth(), panel, 0, weight.depth());
    });
}

// A whole tile of the last slice: its numbers go from the registers to an epilogue.
template <class Epilogue>
struct Last {
    const float* sums;  // [rows][kPanel], of the slices before, or null
    i64 row, column;    // of the result
    const Epilogue& epilogue;
    template <int N>
    G2R_INLINE void start(i64 at, vf (&values)[N]) const {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
            values[n] = sums == nullptr ? vf{} : load(sums + at * kPanel + n * kWidth);
    }
    template <int N>
    G2R_INLINE void expect(i64 at) const {
        epilogue.template expect<N>(row + at, column);
    }
    template <int N>
    G2R_INLINE void operator()(i64 at, const vf (&values)[N]) const {
        epilogue(row + at, column, values);
    }
};

template <class Epilogue>
void hand_over(const float* sums, i64 rows, i64 vectors, i64 row, i64 column,
               const Epilogue& epilogue) {
    for (i64 r = 0; r < rows; r++, sums += kPanel) {
        if (vectors == kVectors) {
            vf values[kVectors];
            for (int n = 0; n < kVectors; n++) values[n] = load(sums + n * kWidth);
            epilogue(row + r, column, values);
        } else {
            for (i64 n = 0; n < vectors; n++) {
                const vf values[1] = {load(sums + n * kWidth)};
                epilogue(row + r, column + n * kWidth, values);
            }
        }
    }
}

// [rows][depth] a times the columns of `weight`, a Transposed or a Plain.
//
// epilogue(row, column, values): what becomes of a row's finished numbers from `column` on. Every
// number is handed over once; behind the last column there are zeros up to a whole vector. A panel
// of kPanel columns comes in one piece.
// epilogue.expect<N>(row, column): the same will come for N vectors; the row may not exist.
template <class T, class Weight, class Epilogue>
void multiply(const Rows<T>& a, i64 rows, const Weight& weight, const Epilogue& epilogue) {
    each_piece(rows, ceil_div(weight.columns(), kPanel), [&](i64 panel, i64 row, i64 here) {
        const i64 column = panel * kPanel;
        const i64 vectors = ceil_div(smaller<i64>(kPanel, weight.columns() - column), kWidth);
        const i64 whole = vectors == kVectors ? here / kRows * kRows : 0;  // rows in whole tiles
        const Array<float> sums(here * kPanel);
        each_slice(a, row, weight, panel, [&](i64 k, i64 depth, Operand<T> left, Panel<T> right) {
            const bool is_last = k + depth == weight.depth();
            const i64 first = is_last ? whole : 0;
            product<T>({left.data + first * left.row, left.row, left.step}, here - first, right,
                       vectors, depth, sums + first * kPanel, kPanel, k > 0);
            if (!is_last) return;
            const Last<Epilogue> finish{k > 0 ? sums.data() : nullptr, row, column, epilogue};
            for (i64 r = 0; r < whole; r += kRows)
                tile<T, kRows, kVectors>(left, r, right, depth / Pair<T>::size, finish);
            hand_over(sums + whole * kPanel, here - whole, vectors, row + whole, column, epilogue);
        });
    });
}

// out[rows][columns] = (or, with `add`, +=) a times the columns of `weight`, a multiple of kWidth.
template <class T, class Weight>
void multiply_into(const Rows<T>& a, i64 rows, const Weight& weight, float* out, bool add) {
    const i64 columns = weight.columns();
    each_piece(rows, ceil_div(columns, kPanel), [&](i64 panel, i64 row, i64 here) {
        const i64 column = panel * kPanel;
        const i64 vectors = smaller<i64>(kPanel, columns - column) / kWidth;
        float* c = out + row * columns + column;
        each_slice(a, row, weight, panel, [&](i64 k, i64 depth, Operand<T> left, Panel<T> right) {
            product<T>(left, here, right, vectors, depth, c, columns, add || k > 0);
        });
    });
}

}  // namespace g2r::G2R_NS
