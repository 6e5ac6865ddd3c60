// A layer's second half: the output projection of attention, and the gated MLP, there and back.
#pragma once

#include "stages.h"

namespace g2r::G2R_NS {

// Features of gate and of up that go through the products together: few, so that what lies between
// two products stays in the caches however wide the layer is, and both together are one slice.
constexpr i64 kStripe = kDepth / 2;

// body(first, count) for the stripes of `width` features.
template <class Body>
void each_stripe(i64 width, const Body& body) {
    for (i64 first = 0; first < width; first += kStripe)
        body(first, smaller(kStripe, width - first));
}

// An epilogue of products with gates beside the same ups, in panels of half and half: act(gate) *
// up and what is kept of it.
template <Activation activation, class S, class T>
struct Activate {
    const MlpForward& in;
    i64 start, rows;    // of the chunk
    i64 first, stripe;  // features of the stripe
    T* out;             // [rows][kStripe]

    template <int N>
    G2R_INLINE void expect(i64 row, i64 column) const {
        const i64 kept = in.keep[start + smaller(row, rows - 1)];
        ask_for<N / 2, true>(out + row * kStripe + column / 2);
        if (kept < 0) return;
        const i64 at = kept * in.width + first + column / 2;
        ask_for<N / 2, true>(static_cast<const S*>(in.d_gate) + at);
        ask_for<N / 2, true>(static_cast<const S*>(in.d_up) + at);
    }
    template <int N>
    G2R_INLINE void operator()(i64 row, i64 column, const vf (&values)[N]) const {
        const i64 kept = in.keep[start + row], feature = first + column / 2;
        const i64 left = stripe - column / 2, to = kept * in.width + feature;
        S* const d_gate = static_cast<S*>(in.d_gate) + to;
        S* const d_up = static_cast<S*>(in.d_up) + to;
        S* const shown = static_cast<S*>(in.activation_out);
        T* const activated = out + row * kStripe + column / 2;
        const void *const gate_bias = in.gate.bias, *const up_bias = in.up.bias;
#pragma GCC unroll 8
        for (int n = 0; n < N / 2; n++) {
            const int at = n * kWidth;
            if (at >= left) return;
            const vf gate = values[n] + bias_at<S>(gate_bias, feature + at);
            const vf up = values[N / 2 + n] + bias_at<S>(up_bias, feature + at);
            const Activated act = activate<activation>(gate);
            store(activated + at, act.value * up);
            if (kept < 0) continue;
            store(d_gate + at, act.slope * up);
            store(d_up + at, act.value);
            if (shown != nullptr) store(shown + to + at, act.value * up);
        }
    }
};

// Output features [first, first + count) of a linear layer.
template <class S>
Linear outputs(Linear linear, i64 first, i64 count) {
    linear.weight = static_cast<const S*>(linear.weight) + first * linear.in;
    linear.out = count;
    return linear;
}

template <class S, class T>
void mlp_forward_as(const MlpForward& in) {
    const i64 hidden = in.hidden;
    const S* post_norm = static_cast<const S*>(in.post_norm);
    // Packed one after the other: the output projection, gate and up by stripes, down by stripes.
    const i64 gate_up_at = packed_size(hidden, in.attended_width);
    const i64 down_at = gate_up_at + packed_size(2 * round_up(in.width, kPanel / 2), hidden);
    const PackedAhead<T> ahead(in.rows, down_at + packed_size(hidden, in.width));
    const auto gate_up_of = [&](i64 first, i64 stripe) {
        return Transposed<T, S>{
            stacked<S>(outputs<S>(in.gate, first, stripe), outputs<S>(in.up, first, stripe)),
            post_norm,
            stripe,
            0,
            hidden,
            ahead.from(gate_up_at + packed_size(2 * first, hidden))};
    };
    const auto down_of = [&](i64 first, i64 stripe) {
        return Transposed<T, S>{stacked<S>(in.down),
                                nullptr,
                                0,
                                first,
                                stripe,
                                ahead.from(down_at + packed_size(hidden, first))};
    };
    Transposed<T, S> o{stacked<S>(in.o)};
    o.packed = ahead.from(0);
    pack_ahead(o);
    each_stripe(in.width, [&](i64 first, i64 stripe) {
        pack_ahead(gate_up_of(first, stripe));
        pack_ahead(down_of(first, stripe));
    });
    each_chunk(in.rows, ahead.chunk_rows(), [&](i64 start, i64 rows) {
        const Operands<float, T> attended(rows, in.attended_width);
        const Array<T> normed(rows * hidden), activated(rows * kStripe);
        float* x = in.x + start * hidden;
        const float* mixed = in.attended + start * in.attended_width;
        multiply<T>({attended.of(mixed, rows), in.attended_width}, rows, o,
                    add_into<S>(x, hidden, in.o.bias));
        each_row(rows, [&](i64 r) {
            float* at = x + r * hidden;
            norm_forward<S>(at, hidden, in.eps, in.norm, in.keep[start + r], normed + r * hidden);
            if (in.down.bias != nullptr)
                for (i64 h = 0; h < hidden; h += kWidth)
                    store(at + h, load(at + h) + bias_at<S>(in.down.bias, h));
        });
        each_stripe(in.width, [&](i64 first, i64 stripe) {
            by_activation(in.activation, [&](auto activation) {
                using Epilogue = Activate<decltype(activation)::value, S, T>;
                multiply<T>({normed, hidden}, rows, gate_up_of(first, stripe),
                            Epilogue{in, start, rows, first, stripe, activated});
            });
            multiply_into<T>({activated, kStripe}, rows, down_of(first, stripe), x, true);
        });
    });
}

// An epilogue of products that are gradients of act(gate) * up: those of gate and of up.
template <class S, class T>
struct GateUpGrads {
    const MlpBackward& in;
    i64 start, rows;    // of the chunk
    i64 first, stripe;  // features of the stripe
    T* out;             // [rows][2 * kStripe], the stripe of gate, then of up

    template <int N>
    G2R_INLINE void expect(i64 row, i64 column) const {
        const i64 at = in.saved[start + smaller(row, rows - 1)] * in.width + first + column;
        ask_for<N, false>(static_cast<const S*>(in.d_gate) + at);
        ask_for<N, false>(static_cast<const S*>(in.d_up) + at);
        ask_for<N, true>(out + row * 2 * kStripe + column);
        ask_for<N, true>(out + row * 2 * kStripe + stripe + column);
    }
    template <int N>
    G2R_INLINE void operator()(i64 row, i64 column, const vf (&values)[N]) const {
        const i64 from = in.saved[start + row] * in.width + first + column;
        const S* const d_gate = static_cast<const S*>(in.d_gate) + from;
        const S* const d_up = static_cast<const S*>(in.d_up) + from;
        T* const gate_out = out + row * 2 * kStripe + column;
        T* const up_out = gate_out + stripe;
        S* shown = static_cast<S*>(in.gate_up);
        if (shown != nullptr) shown += (start + row) * 2 * in.width + first + column;
        const i64 width = in.width;
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const int at = n * kWidth;
            const vf gate = values[n] * load(d_gate + at), up = values[n] * load(d_up + at);
            store(gate_out + at, gate);
            store(up_out + at, up);
            if (shown == nullptr) continue;
            store(shown + at, gate);
            store(shown + width + at, up);
        }
    }
};

template <class S, class T>
void mlp_backward_as(const MlpBackward& in) {
    const i64 hidden = in.hidden;
    const bool shown = in.gate_up != nullptr;
    const S* post_norm = static_cast<const S*>(in.post_norm);
    // Packed one after the other: the output projection, down by stripes, gate and up by stripes.
    const i64 down_at = packed_size(in.attended_width, hidden);
    const i64 gate_up_at = down_at + packed_size(in.width, hidden);
    const PackedAhead<T> ahead(in.rows, gate_up_at + packed_size(hidden, 2 * in.width));
    const auto down_of = [&](i64 first, i64 stripe) {
        return Plain<T, S>{stacked<S>(in.down), nullptr, first, stripe,
                           ahead.from(down_at + packed_size(first, hidden))};
    };
    const auto gate_up_of = [&](i64 first, i64 stripe) {
        return Plain<T, S>{
            stacked<S>(outputs<S>(in.gate, first, stripe), outputs<S>(in.up, first, stripe)),
            shown ? nullptr : post_norm, 0, hidden,
            ahead.from(gate_up_at + packed_size(hidden, 2 * first))};
    };
    Plain<T, S> o{stacked<S>(in.o)};
    o.packed = ahead.from(0);
    pack_ahead(o);
    each_stripe(in.width, [&](i64 first, i64 stripe) {
        pack_ahead(down_of(first, stripe));
        pack_ahead(gate_up_of(first, stripe));
    });
    each_chunk(in.rows, ahead.chunk_rows(), [&](i64 start, i64 rows) {
        const Operands<float, T> grads(rows, hidden);
        const Array<T> back(rows * 2 * kStripe);
        const Array<float> dh(rows * hidden);
        float* dx = in.dx + start * hidden;
        const int32_t* saved = in.saved + start;
        const Rows<T> grad{grads.of(dx, rows), hidden};
        each_stripe(in.width, [&](i64 first, i64 stripe) {
            multiply(grad, rows, down_of(first, stripe),
                     GateUpGrads<S, T>{in, start, rows, first, stripe, back});
            multiply_into<T>({back, 2 * kStripe}, rows, gate_up_of(first, stripe), dh, first > 0);
        });
        each_row(rows, [&](i64 r) {
            float* g = dh + r * hidden;
            if (shown)
                show_norm(g, hidden, in.normed, saved[r], post_norm,
                          in.norm_products + (start + r) * hidden);
            norm_backward<S>(g, hidden, in.normed, in.rstd, saved[r], dx + r * hidden);
        });
        S* out = static_cast<S*>(in.grad_attended) + start * in.attended_width;
        multiply<T>({grads.of(dx, rows), hidden}, rows, o, store_into(out, in.attended_width));
    });
}

inline void mlp_forward(const MlpForward& in) { G2R_BY_DTYPE(mlp_forward, in); }
inline void mlp_backward(const MlpBackward& in) { G2R_BY_DTYPE(mlp_backward, in); }

}  // namespace g2r::G2R_NS
