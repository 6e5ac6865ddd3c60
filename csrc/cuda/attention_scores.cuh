// What happens to a tile of scores between its products: the cap, the mask, the running softmax.
// Fragments of results as in attention_tile.cuh, [m_tiles][n_tiles][4]; the rows are queries, the
// columns keys.
#pragma once

#include "attention_tile.cuh"

namespace g2r::gpu {

template <int m_tiles, int n_tiles>
G2R_DEVICE void cap_scores(float (&s)[m_tiles][n_tiles][4], float softcap, float inverse_softcap) {
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int n = 0; n < n_tiles; ++n) {
            G2R_UNROLL
            for (int c = 0; c < 4; ++c) s[m][n][c] = softcap * tanh(s[m][n][c] * inverse_softcap);
        }
    }
}

// Puts `value` where a query does not see a key. `key`: the position of the first column;
// `position`: those of the queries, from the thread's first row on.
template <int m_tiles, int n_tiles>
G2R_DEVICE void hide_scores(float (&s)[m_tiles][n_tiles][4], const int* position, int key,
                            int window, float value) {
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            // Of the keys of this thread, those in [0, from] and not in [0, from - window].
            const int from = position[m * 16 + half * 8] - key - (lane_index() & 3) * 2;
            const int hidden = from - window;
            G2R_UNROLL
            for (int n = 0; n < n_tiles; ++n) {
                G2R_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int at = n * 8 + i;
                    if (at > from || at <= hidden) s[m][n][half * 2 + i] = value;
                }
            }
        }
    }
}

// The softmax of rows whose keys come tile by tile.
template <int m_tiles>
class RunningSoftmax {
 public:
    G2R_DEVICE RunningSoftmax() {
        G2R_UNROLL
        for (int m = 0; m < m_tiles; ++m) {
            G2R_UNROLL
            for (int half = 0; half < 2; ++half) {
                largest_[m][half] = -infinity();
                total_[m][half] = 0.0f;
            }
        }
    }

    // Makes p = exp(s - largest) of a tile of scores; sums over the tiles before are to be
    // multiplied by `shrink`, unless for no lane of the warp this returns true.
    template <int n_tiles>
    G2R_DEVICE bool add(float (&s)[m_tiles][n_tiles][4], float (&shrink)[m_tiles][2]) {
        bool shrinks = false;
        G2R_UNROLL
        for (int m = 0; m < m_tiles; ++m) {
            G2R_UNROLL
            for (int half = 0; half < 2; ++half) {
                float here = largest_[m][half];
                G2R_UNROLL
                for (int n = 0; n < n_tiles; ++n) {
                    here = max(here, max(s[m][n][half * 2], s[m][n][half * 2 + 1]));
                }
                here = quad_max(here);
                // A row may see no key of the tiles so far.
                const float shift = here == -infinity() ? 0.0f : here * log2_e;
                shrink[m][half] = exp2(largest_[m][half] * log2_e - shift);
                shrinks |= here != largest_[m][half];
                largest_[m][half] = here;
                float sum = 0.0f;
                G2R_UNROLL
                for (int n = 0; n < n_tiles; ++n) {
                    G2R_UNROLL
                    for (int c = half * 2; c < half * 2 + 2; ++c) {
                        s[m][n][c] = exp2(s[m][n][c] * log2_e - shift);
                        sum += s[m][n][c];
                    }
                }
                total_[m][half] = total_[m][half] * shrink[m][half] + sum;
            }
        }
        return shrinks;
    }

    // Divides the sums of rows of v, and writes the log-sum-exp of rows whose index is not
    // negative.
    template <int n_tiles>
    G2R_DEVICE void finish(float (&out)[m_tiles][n_tiles][4], const int (&index)[m_tiles][2],
                           float* lse) const {
        G2R_UNROLL
        for (int m = 0; m < m_tiles; ++m) {
            G2R_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float sum = quad_sum(total_[m][half]);
                const float scale = 1.0f / sum;
                G2R_UNROLL
                for (int n = 0; n < n_tiles; ++n) {
                    out[m][n][half * 2] *= scale;
                    out[m][n][half * 2 + 1] *= scale;
                }
                if ((lane_index() & 3) == 0 && index[m][half] >= 0) {
                    lse[index[m][half]] = largest_[m][half] + log(sum);
                }
            }
        }
    }

 private:
    float largest_[m_tiles][2], total_[m_tiles][2];  // total: of this thread's columns
};

template <int m_tiles, int n_tiles>
G2R_DEVICE void scale_rows(float (&d)[m_tiles][n_tiles][4], const float (&by)[m_tiles][2]) {
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int n = 0; n < n_tiles; ++n) {
            G2R_UNROLL
            for (int c = 0; c < 4; ++c) d[m][n][c] *= by[m][c / 2];
        }
    }
}

// p of a score; lse2 is in units of log 2.
G2R_DEVICE float probability(float s, float lse2) { return exp2(s * log2_e - lse2); }

// Of scores: probabilities, times the slope of the cap where there is one. `lse2`: from the
// thread's first row on.
template <bool capped, int m_tiles, int n_tiles>
G2R_DEVICE void slopes_of_scores(float (&s)[m_tiles][n_tiles][4], const float* lse2, float softcap,
                                 float inverse_softcap) {
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float shift = lse2[m * 16 + half * 8];
            G2R_UNROLL
            for (int n = 0; n < n_tiles; ++n) {
                G2R_UNROLL
                for (int c = half * 2; c < half * 2 + 2; ++c) {
                    if constexpr (capped) {
                        const float share = tanh(s[m][n][c] * inverse_softcap);
                        s[m][n][c] = probability(softcap * share, shift) * (1.0f - share * share);
                    } else {
                        s[m][n][c] = probability(s[m][n][c], shift);
                    }
                }
            }
        }
    }
}

// slopes *= dp - delta, which makes them gradients of scores. `delta`: from the thread's first row
// on.
template <int m_tiles, int n_tiles>
G2R_DEVICE void times_centred(float (&slopes)[m_tiles][n_tiles][4],
                              const float (&dp)[m_tiles][n_tiles][4], const float* delta) {
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float sum = delta[m * 16 + half * 8];
            G2R_UNROLL
            for (int n = 0; n < n_tiles; ++n) {
                G2R_UNROLL
                for (int c = half * 2; c < half * 2 + 2; ++c) {
                    slopes[m][n][c] *= dp[m][n][c] - sum;
                }
            }
        }
    }
}

// ------------------------------------------- the same where rows are keys and columns are queries

// Tables of what belongs to a query start at the thread's first column, column 8 n + i is its
// n-th pair's i-th.

// p of scores, which become their shares of the cap, tanh(s / softcap), where there is one.
template <bool capped, int m_tiles, int n_tiles>
G2R_DEVICE void probabilities_of_columns(float (&p)[m_tiles][n_tiles][4],
                                         float (&s)[m_tiles][n_tiles][4], const float* lse2,
                                         float softcap, float inverse_softcap) {
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int n = 0; n < n_tiles; ++n) {
            G2R_UNROLL
            for (int c = 0; c < 4; ++c) {
                const float shift = lse2[n * 8 + (c & 1)];
                if constexpr (capped) {
                    s[m][n][c] = tanh(s[m][n][c] * inverse_softcap);
                    p[m][n][c] = probability(softcap * s[m][n][c], shift);
                } else {
                    p[m][n][c] = probability(s[m][n][c], shift);
                }
            }
        }
    }
}

// Zeros where a query does not see a key. `key`: the position of the thread's first row.
template <int m_tiles, int n_tiles>
G2R_DEVICE void hide_columns(float (&p)[m_tiles][n_tiles][4], const int* position, int key,
                             int window) {
    G2R_UNROLL
    for (int n = 0; n < n_tiles; ++n) {
        G2R_UNROLL
        for (int i = 0; i < 2; ++i) {
            // Of the keys of this thread, those in [0, from] and not in [0, from - window].
            const int from = position[n * 8 + i] - key;
            const int hidden = from - window;
            G2R_UNROLL
            for (int m = 0; m < m_tiles; ++m) {
                G2R_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int down = m * 16 + half * 8;
                    if (down > from || down <= hidden) p[m][n][half * 2 + i] = 0.0f;
                }
            }
        }
    }
}

// p times the slope of the cap, of shares.
template <int m_tiles, int n_tiles>
G2R_DEVICE void times_slope(float (&p)[m_tiles][n_tiles][4],
                            const float (&share)[m_tiles][n_tiles][4]) {
    G2R_UNROLL
    for (int m = 0; m < m_tiles; ++m) {
        G2R_UNROLL
        for (int n = 0; n < n_tiles; ++n) {
            G2R_UNROLL
            for (int c = 0; c < 4; ++c) p[m][n][c] *= 1.0f - share[m][n][c] * share[m][n][c];
        }
    }
}

// dp -> slopes * (dp - delta), gradients of scores.
template <int m_tiles, int n_tiles>
G2R_DEVICE void centre_columns(float (&dp)[m_tiles][n_tiles][4],
                               const float (&slopes)[m_tiles][n_tiles][4], const float* delta) {
    G2R_UNROLL
    for (int n = 0; n < n_tiles; ++n) {
        G2R_UNROLL
        for (int i = 0; i < 2; ++i) {
            const float centre = delta[n * 8 + i];
            G2R_UNROLL
            for (int m = 0; m < m_tiles; ++m) {
                G2R_UNROLL
                for (int c = i; c < 4; c += 2)
                    dp[m][n][c] = slopes[m][n][c] * (dp[m][n][c] - centre);
            }
        }
    }
}

}  // namespace g2r::gpu
