"""The multiply-adds that GRAIL, G2RL and VIGOR cannot do without, and those of their rivals.

Required, per method; the terms of a pass are those of `flops.py`, with its letters:

    GRAIL    a pass over prompt + completion up to the span's last token but one; reads: the rows
             that predict the span; comes back to the prompt's last row. Nothing behind the span.
    G2RL     a forward over prompt + completion but its last token; reads: the rows that predict the
             completion. Beside it `features`: H W per completion, the one product
             W^T (sum_t alpha_t (onehot(y_t) - p_t)). Where hidden states are given the forward is
             the head's alone, H W per token.
    VIGOR    the pass of G2RL, coming back to the first token. Beside it `norms`: per completion and
             linear layer of d inputs, p outputs and m rows the cheaper of m d p, the gradient
             formed, and (d + p) m (m + 1) / 2, the triangles of A A^T and B B^T. m: the head, and
             the last layer but for K and V, have the completion's rows, the others all. Tied
             embeddings add `cross`: H per token of the completion and distinct token of the
             sequence. `parameters="lm_head"`: a forward, and the head's norm.

Not counted, beside what `flops.py` leaves out: sums of squares, bias and norm gradients, the sums
over equal tokens of an embedding's gradient.

A rival is counted as it works: `stock` is the transformers model, all rows in all layers and, in
attention's backward, five products over every key; `swapped` is the same with the inside of
`tuned.py`, which keeps probabilities (the passes above form the scores again), spares K and V
gradients of constant keys, and in the last layer everything but K, V and Q of rows that nobody
reads. Where short completions run as one padded batch, padding is not counted.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.flops import Judgement, RequiredFlops, Sizes, required_flops
from bench.signal_workload import Rollouts

__all__ = [
    "REQUIRED",
    "dense_norms",
    "gradient_or_grams",
    "linear_norms",
    "stock",
    "swapped",
]

Terms = dict[str, int]
# FLOPs of one linear layer's gradient norm from (rows, inputs, outputs).
Norm = Callable[[int, int, int], int]


def _terms(found: RequiredFlops) -> Terms:
    return dict(vars(found))


def _read_completions(rollouts: Rollouts, *, comes_back: bool) -> list[Judgement]:
    """Prompt + completion but its last token, all of whose predictions are read."""
    prompt = len(rollouts.prompt)
    found = []
    for i in range(len(rollouts.completions)):
        ids = rollouts.sequence(i)[:-1].tolist()
        start = 0 if comes_back else len(ids)
        found.append(Judgement(ids, start, comes_back, tuple(range(prompt - 1, len(ids)))))
    return found


def grail(sizes: Sizes, rollouts: Rollouts) -> Terms:
    prompt = len(rollouts.prompt)
    judgements = []
    for i, (start, _, _, stop) in enumerate(rollouts.spans):
        ids = rollouts.sequence(i)[: prompt + stop - 1].tolist()
        reads = tuple(range(prompt + start - 1, prompt + stop - 1))
        judgements.append(Judgement(ids, prompt - 1, True, reads))
    return _terms(required_flops(sizes, judgements))


def g2rl(sizes: Sizes, rollouts: Rollouts) -> Terms:
    head = sizes.hidden * sizes.vocab
    features = {"features": 2 * len(rollouts.completions) * head}
    if rollouts.hidden:
        return {"head_forward": 2 * sum(map(len, rollouts.completions)) * head, **features}
    judgements = _read_completions(rollouts, comes_back=False)
    return _terms(required_flops(sizes, judgements)) | features


def vigor(sizes: Sizes, rollouts: Rollouts, *, tied: bool = False) -> Terms:
    head_only = rollouts.parameters == "lm_head"
    judgements = _read_completions(rollouts, comes_back=not head_only)
    terms = _terms(required_flops(sizes, judgements))
    terms["norms"] = sum(
        linear_norms(sizes, len(rollouts.prompt), len(c), gradient_or_grams, head_only=head_only)
        for c in rollouts.completions
    )
    if tied and not head_only:
        terms["cross"] = sum(
            2 * sizes.hidden * len(c) * len(set(j.input_ids))
            for c, j in zip(rollouts.completions, judgements, strict=True)
        )
    return terms


REQUIRED: dict[str, Callable[..., Terms]] = {
    "grail": grail,
    "g2rl": g2rl,
    "vigor": vigor,
}


def gradient_or_grams(rows: int, inputs: int, outputs: int) -> int:
    """By symmetry half of each Gram matrix is enough."""
    return min(2 * rows * inputs * outputs, rows * (rows + 1) * (inputs + outputs))


def dense_norms(rows: int, inputs: int, outputs: int) -> int:
    """The same with whole Gram matrices, as a matrix product of PyTorch computes them."""
    return min(2 * rows * inputs * outputs, 2 * rows * rows * (inputs + outputs))


def linear_norms(
    sizes: Sizes, prompt: int, completion: int, norm: Norm, *, head_only: bool = False
) -> int:
    """All linear layers' gradient norms of one completion."""
    total = norm(completion, sizes.hidden, sizes.vocab)
    if head_only:
        return total
    query, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    rows = prompt + completion - 1
    for layer in range(sizes.layers):
        # In the last layer rows of the prompt reach the loss through K and V alone.
        others = completion if layer == sizes.layers - 1 else rows
        total += 2 * norm(rows, sizes.hidden, kv) + norm(others, sizes.hidden, query)
        total += norm(others, query, sizes.hidden)
        total += 2 * norm(others, sizes.hidden, sizes.intermediate)
        total += norm(others, sizes.intermediate, sizes.hidden)
    return total


# Rivals -------------------------------------------------------------------------------------------


def _keys(rows: int, before: int) -> int:
    """Keys that `rows` queries see behind `before` cached ones."""
    return rows * before + rows * (rows + 1) // 2


def _linear(sizes: Sizes) -> tuple[int, int, int]:
    """Multiply-adds per row of one layer: K and V; Q; the rest."""
    query, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    rest = sizes.hidden * query + 3 * sizes.hidden * sizes.intermediate
    return 2 * sizes.hidden * kv, sizes.hidden * query, rest


def stock(
    sizes: Sizes,
    rows: int,
    *,
    before: int = 0,
    head: int = 0,
    backward: bool = False,
    weights: bool = False,
) -> int:
    """`rows` through the stock model behind `before` cached keys; `head` rows of logits."""
    linear = rows * sizes.layers * sum(_linear(sizes)) + head * sizes.hidden * sizes.vocab
    keys = sizes.layers * sizes.heads * sizes.head_dim * _keys(rows, before)
    passes = 1 + backward + weights
    return 2 * (passes * linear + (2 + 5 * backward) * keys)


def swapped(
    sizes: Sizes,
    rows: int,
    *,
    reads: int,
    before: int = 0,
    head: int | None = None,
    live: int | None = None,
    forward: bool = True,
    backward: bool = False,
) -> int:
    """The same with the inside swapped; `reads` of the rows, the last ones, leave the last layer.

    `live`: of the keys before, how many get a gradient. `head`: rows of logits, `reads` if not
    given.
    """
    kv, query, rest = _linear(sizes)
    body = sizes.layers - 1
    linear = body * rows * (kv + query + rest) + rows * (kv + query) + reads * rest
    linear += (reads if head is None else head) * sizes.hidden * sizes.vocab
    unread = 0 if reads else rows * query  # queries that come from nowhere
    width = sizes.heads * sizes.head_dim
    behind = 0 if live is None else live
    seen = body * _keys(rows, before) + _keys(reads, before + rows - reads)
    graded = body * _keys(rows, behind) + _keys(reads, behind + rows - reads)
    total = 0
    if forward:
        total += 2 * (linear + 2 * width * seen)
    if backward:
        total += 2 * (linear - unread + width * 2 * (seen + graded))
    return total
