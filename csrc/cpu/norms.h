// Squared norms of weight gradients, per lane, without the gradients.
//
// For M rows with inputs A and output gradients B either two Gram matrices, panel by panel,
// |A^T B|^2 = sum over s, t of (A_s . A_t) (B_s . B_t), the upper triangle for both; or the
// gradient itself, a tile at a time. S is the storage type, T what products multiply.
#pragma once

#include "gemm.h"
#include "rows.h"

namespace g2r::G2R_NS {

// Rows that one task holds sums of, beside a panel of columns.
constexpr i64 kNormRows = 1008;
// Features of A that are packed together as the rows of a product.
constexpr i64 kFeatures = 16 * kRows;

// Rows of a matrix by entry, as products read them.
template <class T>
struct Entries {
    const T* data;
    i64 ld;
    const int32_t* index;  // null: entry e is row e
    i64 width;             // a multiple of 16

    G2R_INLINE const T* row(i64 entry) const {
        return data + (index == nullptr ? entry : index[entry]) * ld;
    }
    // use(first, count, stride): stretches of [start, stop) whose rows lie evenly spaced.
    template <class Use>
    void each_run(i64 start, i64 stop, const Use& use) const {
        for (i64 first = start; first < stop;) {
            i64 end = first + 1;
            const i64 stride = end < stop ? row(end) - row(first) : ld;
            while (end < stop && row(end) - row(end - 1) == stride) end++;
            use(first, end - first, stride);
            first = end;
        }
    }
};

// The rows themselves, or copies where products multiply another type or a width is odd.
template <class S, class T>
class EntryRows {
 public:
    EntryRows(const void* data, i64 width, const int32_t* index, i64 entries)
        : copied_(!same_type || width % 16 != 0 ? entries * round_up(width, 16) : 0),
          found_{nullptr, width, index, round_up(width, 16)} {
        const S* from = static_cast<const S*>(data);
        if constexpr (same_type) {
            if (width % 16 == 0) {
                found_.data = from;
                return;
            }
        }
        T* const to = copied_;
        const i64 ld = found_.width;
        each_row(entries, [&](i64 e) {
            const S* row = from + index[e] * width;
            for (i64 i = 0; i < ld; i++) to[e * ld + i] = narrow<T>(i < width ? widen(row[i]) : 0);
        });
        found_ = {to, ld, nullptr, ld};
    }
    const Entries<T>& operator*() const { return found_; }

 private:
    static constexpr bool same_type = sizeof(S) == sizeof(T);
    Array<T> copied_;
    Entries<T> found_;
};

// A tile's sum begins at zero and is added to the slices before it when it is finished: no sum has
// more terms than a slice is deep, or than there are slices. One sum through all slices would err
// to one side in bfloat16, by some 2e-6 in a thousand terms: squares of its numbers are 0, 1 or 4
// modulo 8, and what of them is rounded off is not zero on average.
struct AddWhole : Store {
    template <int N>
    G2R_INLINE void operator()(i64 row, const vf (&values)[N]) const {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            float* const at = out + row * ld + n * kWidth;
            store(at, load(at) + values[n]);
        }
    }
};

// Terms that are added one behind the other, before their sum is added to others: rounding grows
// with their number.
constexpr i64 kTerms = 512;

// A product of [rows][kPanel], of the first slice or added to what those before it gave.
template <class T>
void add_slice(Operand<T> a, i64 rows, Panel<T> b, i64 vectors, i64 depth, float* c, bool first) {
    if (first)
        product<T>(a, rows, b, vectors, depth, Store{c, kPanel});
    else
        product<T>(a, rows, b, vectors, depth, AddWhole{{c, kPanel}});
}

// c[r][kPanel] = x[row + r] . x[column + c], all of lane entries.
template <class T>
void gram_panel(const Entries<T>& x, i64 row, i64 rows, i64 column, i64 columns, float* c) {
    const Array<T> slice(kTerms * kPanel);
    for (i64 k = 0; k < x.width; k += kTerms) {
        const i64 depth = smaller(kTerms, x.width - k);
        pack_transposed<T, T>(slice, depth, nullptr,
                              [&](i64 j) { return j < columns ? x.row(column + j) + k : nullptr; });
        const Panel<T> right{slice, kPanel * Pair<T>::size};
        x.each_run(row, row + rows, [&](i64 first, i64 count, i64 stride) {
            const Operand<T> left{x.row(first) + k, stride, Pair<T>::size};
            add_slice<T>(left, count, right, ceil_div(columns, kWidth), depth,
                         c + (first - row) * kPanel, k == 0);
        });
    }
}

// Sums of a * b, vector by vector. In double: in float the square of what is below 1e-19 is no
// longer a normal number.
class SumOfProducts {
 public:
    G2R_INLINE void add(const vf& a, const vf& b) {
        sums_ += __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
    }
    double total() const {
        double total = 0;
        for (int i = 0; i < kWidth; i++) total += sums_[i];
        return total;
    }

 private:
    typedef double Wide __attribute__((vector_size(kWidth * 8)));
    Wide sums_ = {};
};

// Sum of a * b over [rows][columns, whole vectors] of two tiles of kPanel.
inline double sum_of_products(const float* a, const float* b, i64 rows, i64 columns) {
    SumOfProducts sums;
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < columns; c += kWidth)
            sums.add(load(a + r * kPanel + c), load(b + r * kPanel + c));
    return sums.total();
}

// A lane's entries, what of them a task takes, and which way.
struct NormTask {
    i64 first, entries;  // of the lane
    i64 panel;           // columns from panel * kPanel: entries, or features of B
    i64 row, rows;       // entries, or features of A
    bool gram;
};

template <class T>
double gram_task(const Entries<T>& a, const Entries<T>& b, const NormTask& task) {
    const i64 column = task.panel * kPanel;
    const i64 columns = smaller<i64>(kPanel, task.entries - column);
    const Array<float> of_a(task.rows * kPanel), of_b(task.rows * kPanel);
    gram_panel(a, task.first + task.row, task.rows, task.first + column, columns, of_a);
    gram_panel(b, task.first + task.row, task.rows, task.first + column, columns, of_b);
    // What lies before the panel stands for its mirror image too.
    const i64 before = larger<i64>(0, smaller(task.rows, column - task.row));
    return 2 * sum_of_products(of_a, of_b, before, columns) +
           sum_of_products(of_a + before * kPanel, of_b + before * kPanel, task.rows - before,
                           columns);
}

// `count` entries from `first` on of columns [column, column + wide) as [k][stride], pairs
// together.
template <class T>
void pack_entries(const Entries<T>& x, i64 first, i64 count, i64 column, i64 wide, i64 stride,
                  const T* zeros, T* out) {
    constexpr int pair = Pair<T>::size;
    for (i64 at = 0; at < count; at += pair, out += stride * pair) {
        const T* even = x.row(first + at) + column;
        const T* odd = at + pair - 1 < count ? x.row(first + at + pair - 1) + column : zeros;
        for (i64 j = 0; j < wide; j += kWidth) {
            vu unit;
            if constexpr (pair == 1)
                unit = bit_cast<vu>(load(even + j));
            else
                unit = halves_of(even + j) | halves_of(odd + j) << 16;
            std::memcpy(out + j * pair, &unit, sizeof(unit));
        }
    }
}

template <class T>
double gradient_task(const Entries<T>& a, const Entries<T>& b, const NormTask& task) {
    constexpr int pair = Pair<T>::size;
    const i64 column = task.panel * kPanel;
    const i64 columns = smaller<i64>(kPanel, b.width - column);
    const Array<float> sums(task.rows * kPanel);
    constexpr i64 widest = kFeatures > kPanel ? kFeatures : kPanel;
    const Array<T> right(kTerms * kPanel), left(kTerms * kFeatures), zeros(widest);
    std::memset(static_cast<T*>(zeros), 0, size_t(widest) * sizeof(T));
    for (i64 k = 0; k < task.entries; k += kTerms) {
        const i64 depth = smaller(kTerms, task.entries - k);
        pack_entries<T>(b, task.first + k, depth, column, columns, kPanel, zeros, right);
        for (i64 row = 0; row < task.rows; row += kFeatures) {
            const i64 here = smaller(kFeatures, task.rows - row);
            pack_entries<T>(a, task.first + k, depth, task.row + row, here, kFeatures, zeros, left);
            add_slice<T>({left, pair, kFeatures * pair}, here, {right, kPanel * pair},
                         columns / kWidth, round_up(depth, pair), sums + row * kPanel, k == 0);
        }
    }
    return sum_of_products(sums, sums, task.rows, columns);
}

// The tasks of all lanes, a lane's one after the other, of at most `most` rows each; their number.
inline i64 list_tasks(const SquaredGradientNorms& in, i64 a_width, i64 b_width, i64 most,
                      NormTask* tasks) {
    i64 count = 0;
    for (i64 lane = 0; lane < in.lanes; lane++) {
        const i64 first = in.offsets[lane], entries = in.offsets[lane + 1] - first;
        // A panel on the diagonal is computed whole.
        const double by_gram = double(entries + kPanel) * double(a_width + b_width);
        const bool gram = by_gram < 2.0 * double(a_width) * double(b_width);
        const i64 width = entries == 0 ? 0 : gram ? entries : b_width;
        for (i64 panel = ceil_div(width, kPanel); panel-- > 0;) {  // the dearest first
            const i64 rows = gram ? smaller<i64>(entries, (panel + 1) * kPanel) : a_width;
            for (i64 row = 0; row < rows; row += most, count++)
                if (tasks != nullptr)
                    tasks[count] = {first, entries, panel, row, smaller(most, rows - row), gram};
        }
    }
    return count;
}

template <class S, class T>
void squared_gradient_norms_as(const SquaredGradientNorms& in) {
    const EntryRows<S, T> a(in.inputs, in.in, in.kept, in.entries);
    const EntryRows<S, T> b(in.grads, in.out_width, in.rows, in.entries);
    const i64 count = list_tasks(in, (*a).width, (*b).width, kNormRows, nullptr);
    const Array<NormTask> tasks(count);
    const Array<double> found(count);
    list_tasks(in, (*a).width, (*b).width, kNormRows, tasks);
    parallel(count, [&](i64 index) {
        const NormTask& task = tasks[index];
        found[index] = task.gram ? gram_task(*a, *b, task) : gradient_task(*a, *b, task);
    });
    for (i64 lane = 0, at = 0; lane < in.lanes; lane++) {
        double total = 0;
        for (; at < count && tasks[at].first < in.offsets[lane + 1]; at++) total += found[at];
        // Where the terms of the Gram matrices cancel, what is left of them may be below 0.
        in.out[lane] = larger(total, 0.0);
    }
}

// Columns that a task sums.
constexpr i64 kRowSumColumns = 64;

template <class S>
void squared_row_sums_of(const SquaredRowSums& in) {
    const i64 blocks = ceil_div(in.width, kRowSumColumns);
    const Array<double> found(in.lanes * blocks);
    const S* x = static_cast<const S*>(in.x);
    parallel(in.lanes * blocks, [&](i64 index) {
        const i64 lane = index / blocks, column = index % blocks * kRowSumColumns;
        const i64 stop = smaller(in.width, column + kRowSumColumns);
        const i64 first = in.offsets[lane], entries = in.offsets[lane + 1] - first;
        SumOfProducts squares;
        for (i64 c = column; c < stop; c += kWidth) {
            vf sums[4] = {};  // by entry of the lane, wherever the lane begins
            for (i64 e = 0; e < entries; e++)
                sums[e % 4] += load(x + in.rows[first + e] * in.width + c);
            const vf all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            squares.add(all, all);
        }
        found[index] = squares.total();
    });
    for (i64 lane = 0; lane < in.lanes; lane++) {
        in.out[lane] = 0;
        for (i64 block = 0; block < blocks; block++) in.out[lane] += found[lane * blocks + block];
    }
}

inline void squared_gradient_norms(const SquaredGradientNorms& in) {
    G2R_BY_DTYPE(squared_gradient_norms, in);
}

inline void squared_row_sums(const SquaredRowSums& in) {
    in.dtype == Dtype::f32 ? squared_row_sums_of<float>(in) : squared_row_sums_of<bf16>(in);
}

}  // namespace g2r::G2R_NS
