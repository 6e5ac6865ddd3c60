"""The tables of the GPU kernels against a walk over every row in Python."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native_arguments import Draw
from native_tries import TRIES, backward, forward
from torch import Tensor

from g2r_fast.device_tables import backward_tiles, forward_tiles
from g2r_fast.plan import PackedPlan, PackedSequence
from g2r_fast.tables import backward_queries, forward_queries

CPU = torch.device("cpu")


def queries_of(a: dict[str, Any]) -> Any:
    names = ("segments", "positions", "block_lanes", "runs", "run_lanes")
    tables = {name: a[name] for name in names if name in a}
    return SimpleNamespace(
        **tables, forward_blocks=a["blocks"], backward_blocks=a["blocks"], on_device={}
    )


def packed_rows(tokens: int, tile: int, step: int, group: int) -> list[tuple[int, int]]:
    """(token, head of the group) of a tile."""
    rows = range(tile * step, min((tile + 1) * step, tokens * group))
    return [divmod(row, group) for row in rows]


def all_int32(tiles: Any) -> bool:
    tables = [x for x in vars(tiles).values() if isinstance(x, Tensor)]
    return all(x.dtype == torch.int32 and x.is_contiguous() for x in tables)


@pytest.mark.parametrize("group", [1, 6, 7])
@pytest.mark.parametrize("step", [16, 64])
@pytest.mark.parametrize("name", TRIES)
def test_forward_tiles_hold_every_row_once(name: str, step: int, group: int) -> None:
    a = forward(Draw(torch.float32, 0), TRIES[name], 1, 1, 16)
    tiles = forward_tiles(queries_of(a), group, step, CPU)
    assert all_int32(tiles)
    assert torch.equal(tiles.segments.long(), a["segments"])
    assert torch.equal(tiles.positions.long(), a["positions"])
    assert tiles.length == a["segments"][:, 1].max()
    found, costs = [], []
    for segment, first, tokens, tile in tiles.tiles.tolist():
        rows = packed_rows(tokens, tile, step, group)
        assert rows, "an empty tile"
        found += [(segment, first + token, head) for token, head in rows]
        costs.append(int(a["positions"][first + rows[-1][0]]))
    expected = [
        (segment, first + token, head)
        for segment, first, count in a["blocks"].tolist()
        for token in range(count)
        for head in range(group)
    ]
    assert sorted(found) == sorted(expected)
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("group", [1, 6, 7])
@pytest.mark.parametrize("name", TRIES)
def test_backward_tiles_hold_every_row_and_every_pair_once(name: str, group: int) -> None:
    a = backward(Draw(torch.float32, 0), TRIES[name], 1, 1, 16)
    step, keys_step = 16, 32
    tiles = backward_tiles(queries_of(a), group, step, keys_step, CPU)
    assert all_int32(tiles)
    lanes = a["block_lanes"].tolist()
    # (lane, row of q, backward row) of every query.
    asked = {
        (lanes[lane_at + c], first + t, row + t * count + c): segment
        for segment, first, tokens, row, lane_at, count in a["blocks"].tolist()
        for t in range(tokens)
        for c in range(count)
    }
    entries = tiles.entries.tolist()
    found = {}
    for segment, first, tokens, row, stride, lane in entries:
        for t in range(tokens):
            found[lane, first + t, row + t * stride] = segment
    assert found == asked
    order = [(entry[5], int(a["positions"][entry[1]])) for entry in entries]
    assert order == sorted(order)

    rows = []
    for entry, tile in tiles.query_tiles.tolist():
        here = packed_rows(entries[entry][2], tile, step, group)
        assert here
        rows += [(entry, *row) for row in here]
    assert len(rows) == len(set(rows)) == len(asked) * group

    # Every key, and the queries of its lane at or behind its segment's start.
    names, wanted = a["run_lanes"].tolist(), set()
    for segment, row, tokens, lane_at, count in a["runs"].tolist():
        start, _, key_row, _ = a["segments"][segment].tolist()
        for c in range(count):
            lane = names[lane_at + c]
            behind = frozenset(
                back for (x, q, back) in asked if x == lane and a["positions"][q] >= start
            )
            for t in range(tokens):
                wanted.add((key_row + t, start + t, row + t * count + c, behind))
    got = []
    keys = tiles.keys.tolist()
    for index, tile in tiles.key_tiles.tolist():
        key_row, start, tokens, row, stride, first, last = keys[index]
        behind = frozenset(e[3] + t * e[4] for e in entries[first:last] for t in range(e[2]))
        here = range(tile * keys_step, min((tile + 1) * keys_step, tokens))
        assert here
        got += [(key_row + t, start + t, row + t * stride, behind) for t in here]
    assert len(got) == len(set(got)) and set(got) == wanted


def test_built_once_for_every_tile_size() -> None:
    sequences = [PackedSequence([1, 2, 3, 4 + i], 1) for i in range(3)]
    plan = PackedPlan.build(sequences)
    queries = forward_queries(plan)
    first = forward_tiles(queries, 2, 16, CPU)
    assert forward_tiles(queries, 2, 16, CPU) is first
    assert forward_tiles(queries, 2, 32, CPU) is not first
    assert forward_tiles(queries, 1, 16, CPU) is not first
    run = plan.backward(range(3))
    saved = torch.arange(1, plan.rows)
    queries = backward_queries(plan, run, saved)
    assert backward_tiles(queries, 2, 16, 16, CPU) is backward_tiles(queries, 2, 16, 16, CPU)


def test_tables_lie_at_multiples_of_64_bytes() -> None:
    a = backward(Draw(torch.float32, 0), TRIES["deep"], 1, 1, 16)
    tiles = backward_tiles(queries_of(a), 1, 16, 16, CPU)
    tables = [x for x in vars(tiles).values() if isinstance(x, Tensor)]
    starts = [x.data_ptr() for x in tables]
    assert all((start - starts[0]) % 64 == 0 for start in starts)


def test_nothing_makes_no_tiles() -> None:
    plan = PackedPlan.build([])
    tiles = forward_tiles(forward_queries(plan), 2, 16, CPU)
    assert tiles.tiles.shape == (0, 4) and tiles.length == 0
    queries = backward_queries(plan, plan.backward([]), torch.empty(0, dtype=torch.int64))
    back = backward_tiles(queries, 2, 16, 16, CPU)
    assert back.query_tiles.shape == back.key_tiles.shape == (0, 2)
    assert back.entries.shape == (0, 6) and back.keys.shape == (0, 7)
