// Products with weights: rows meet packed slices, and finished tiles go to an epilogue.
#pragma once

#include "pack.h"

namespace g2r::G2R_NS {

// Depth of one step of a product: a slice and six rows stay in the nearest caches.
constexpr i64 kDepth = 512;
// Rows that one task takes through a slice: many, for what packing it costs. They are more than the
// second-level cache holds, and come from behind it one tile ahead of their use.
constexpr i64 kTaskRows = 1008;
// Where there are too few tasks for the threads, a task takes fewer rows, but not fewer than these.
constexpr i64 kFewestTaskRows = 126;

// The fewest rows that one thread takes through all the products of a stage by itself.
constexpr i64 kFewestOwnRows = 252;

// Rows to be multiplied: number k of a row is data[k / kDepth * slice + row * ld + k % kDepth].
template <class T>
struct Rows {
    const T* data;
    i64 ld;
    i64 slice = kDepth;  // row-major
};

// Rows [depth / kDepth][rows][kDepth]: a slice of wide rows lies together, in few pages.
template <class T>
class SlicedRows {
 public:
    SlicedRows(i64 rows, i64 width)
        : slice_(rows * kDepth), data_(ceil_div(width, kDepth) * slice_) {}
    // Where number k lies, and its neighbours up to the next multiple of 16.
    G2R_INLINE T* at(i64 row, i64 k) const {
        return data_ + k / kDepth * slice_ + row * kDepth + k % kDepth;
    }
    operator Rows<T>() const { return {data_, kDepth, slice_}; }

 private:
    i64 slice_;
    Array<T> data_;
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

// c[rows][ldc] = (or, with `add`, +=) rows of a times the columns of a panel of `weight`.
template <class T, class Weight>
void multiply_panel(const Rows<T>& a, i64 row, i64 rows, const Weight& weight, i64 panel, float* c,
                    i64 ldc, bool add) {
    const Array<T> slice(kDepth * kPanel);
    const i64 columns = smaller<i64>(kPanel, weight.columns() - panel * kPanel);
    for (i64 k = 0; k < weight.depth(); k += kDepth) {
        const i64 depth = smaller(kDepth, weight.depth() - k);
        weight.pack(slice, panel, k, depth);
        const Operand<T> left{a.data + k / kDepth * a.slice + row * a.ld, a.ld, Pair<T>::size};
        const Panel<T> right{slice, kPanel * Pair<T>::size};
        product<T>(left, rows, right, ceil_div(columns, kWidth), depth, c, ldc, add || k > 0);
    }
}

// [rows][depth] a times the columns of `weight`, a Transposed or a Plain.
//
// epilogue(row, rows, column, columns, tile): what becomes of `rows` x `columns` finished numbers,
// tile[r * kPanel + c] belonging to (row + r, column + c). Every number is handed over once.
template <class T, class Weight, class Epilogue>
void multiply(const Rows<T>& a, i64 rows, const Weight& weight, const Epilogue& epilogue) {
    each_piece(rows, ceil_div(weight.columns(), kPanel), [&](i64 panel, i64 row, i64 here) {
        const Array<float> c(here * kPanel);
        const i64 column = panel * kPanel;
        multiply_panel(a, row, here, weight, panel, c, kPanel, false);
        epilogue(row, here, column, smaller<i64>(kPanel, weight.columns() - column),
                 static_cast<const float*>(c));
    });
}

// out[rows][columns] = (or, with `add`, +=) a times the columns of `weight`, a multiple of kWidth.
template <class T, class Weight>
void multiply_into(const Rows<T>& a, i64 rows, const Weight& weight, float* out, bool add) {
    const i64 columns = weight.columns();
    each_piece(rows, ceil_div(columns, kPanel), [&](i64 panel, i64 row, i64 here) {
        float* c = out + row * columns + panel * kPanel;
        multiply_panel(a, row, here, weight, panel, c, columns, add);
    });
}

}  // namespace g2r::G2R_NS
