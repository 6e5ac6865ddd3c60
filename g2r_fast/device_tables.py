"""Query tables as a GPU reads them: int32, flat, in tiles, with the most expensive tiles first.

The `group` query heads of a kv head are packed: row r of a block is query head r % group of the
block's token r // group, so that a tile of rows reads every key once for all heads of the group.
Everything is built on the host, copied at once, and kept on the QueryTables it was built from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .tables import QueryTables

__all__ = ["BackwardTiles", "ForwardTiles", "backward_tiles", "forward_tiles"]


@dataclass(frozen=True)
class ForwardTiles:
    """Tiles of queries; int32."""

    segments: Tensor  # [S, 4]: start, stop, first row of k and v, parent or -1
    positions: Tensor  # [queries]
    tiles: Tensor  # [n, 4]: segment, first row of q, tokens of the block, tile of the block
    length: int = field(kw_only=True)  # of the longest path


@dataclass(frozen=True)
class BackwardTiles:
    """Tiles of queries and of keys, one lane each; int32.

    Token t of an entry lies at row first + t * stride of grad_out and dq; so do dk and dv of keys.
    """

    segments: Tensor  # [S, 4]: start, stop, first row of k and v, parent or -1
    positions: Tensor  # [queries]
    # [E, 6]: segment, first row of q, tokens, first row of grad_out and dq, stride, lane; by lane,
    # then by position
    entries: Tensor
    query_tiles: Tensor  # [n, 2]: entry, tile of the entry
    # [L, 7]: first row of k and v, start, tokens, first row of dk and dv, stride, and the first and
    # the last + 1 of the lane's entries whose queries lie at or behind the start
    keys: Tensor
    key_tiles: Tensor  # [m, 2]: keys, tile of them
    length: int = field(kw_only=True)  # of the longest path


def forward_tiles(
    queries: QueryTables, group: int, rows_per_tile: int, device: torch.device
) -> ForwardTiles:
    """Tiles of `rows_per_tile` packed rows of every block."""
    key = ("forward", group, rows_per_tile, device)
    if key not in queries.on_device:
        blocks = queries.forward_blocks
        segment, first, count = blocks.unbind(1)
        block, tile = _tiles(count * group, rows_per_tile)
        order = _costly_first(_last_position(queries.positions, first, count, group, tile, block,
                                             rows_per_tile))  # fmt: skip
        block, tile = block[order], tile[order]
        tiles = torch.stack((segment[block], first[block], count[block], tile), 1)
        made = _on_device(device, queries.segments, queries.positions, tiles)
        queries.on_device[key] = ForwardTiles(*made, length=_length(queries))
    found: ForwardTiles = queries.on_device[key]
    return found


def backward_tiles(
    queries: QueryTables,
    group: int,
    rows_per_query_tile: int,
    keys_per_tile: int,
    device: torch.device,
) -> BackwardTiles:
    """Tiles of `rows_per_query_tile` packed rows of every entry, and of `keys_per_tile` keys."""
    key = ("backward", group, rows_per_query_tile, keys_per_tile, device)
    if key not in queries.on_device:
        positions = queries.positions
        entries = _entries(queries)
        lanes, first, count = entries[:, 5], entries[:, 1], entries[:, 2]
        entry, tile = _tiles(count * group, rows_per_query_tile)
        order = _costly_first(
            _last_position(positions, first, count, group, tile, entry, rows_per_query_tile)
        )
        query_tiles = torch.stack((entry[order], tile[order]), 1)

        keys = _keys(queries, lanes, positions[first])
        at, tile = _tiles(keys[:, 2], keys_per_tile)
        before = torch.cat((count.new_zeros(1), count.cumsum(0)))
        behind = before[keys[:, 6]] - before[keys[:, 5]]
        order = _costly_first(behind[at] - tile * keys_per_tile)
        key_tiles = torch.stack((at[order], tile[order]), 1)
        made = _on_device(
            device, queries.segments, positions, entries, query_tiles, keys, key_tiles
        )
        queries.on_device[key] = BackwardTiles(*made, length=_length(queries))
    found: BackwardTiles = queries.on_device[key]
    return found


def _entries(queries: QueryTables) -> Tensor:
    blocks, names, positions = queries.backward_blocks, queries.block_lanes, queries.positions
    lanes = blocks[:, 5]
    block, place = _counted(lanes)
    lane = names[blocks[block, 4] + place]
    first = blocks[block, 1]
    order = _by_lane(lane, positions[first]).argsort(stable=True)
    columns = (blocks[block, 0], first, blocks[block, 2], blocks[block, 3] + place, lanes[block])
    return torch.stack((*columns, lane), 1)[order]


def _keys(queries: QueryTables, entry_lanes: Tensor, entry_positions: Tensor) -> Tensor:
    runs, names, segments = queries.runs, queries.run_lanes, queries.segments
    lanes = runs[:, 4]
    run, place = _counted(lanes)
    lane = names[runs[run, 3] + place]
    segment = segments[runs[run, 0]]
    start = segment[:, 0]
    sought = _by_lane(entry_lanes, entry_positions)
    first = torch.searchsorted(sought, _by_lane(lane, start))
    last = torch.searchsorted(sought, _by_lane(lane + 1, torch.zeros_like(start)))
    columns = (segment[:, 2], start, runs[run, 2], runs[run, 1] + place, lanes[run], first, last)
    return torch.stack(columns, 1)


def _by_lane(lane: Tensor, position: Tensor) -> Tensor:
    """One number that orders by lane, then by position."""
    return lane * 2**32 + position


def _counted(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each index as often as it counts, and 0, 1, ... within each."""
    index = torch.arange(len(counts)).repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts)[index]
    return index, torch.arange(len(index)) - starts


def _tiles(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
    return _counted((rows + step - 1) // step)


def _last_position(
    positions: Tensor,
    first: Tensor,
    count: Tensor,
    group: int,
    tile: Tensor,
    block: Tensor,
    step: int,
) -> Tensor:
    """Position of a tile's last query: as many keys, nearly, does it read."""
    token = ((tile + 1) * step - 1) // group
    return positions[first[block] + torch.minimum(token, count[block] - 1)]


def _length(queries: QueryTables) -> int:
    stops = queries.segments[:, 1]
    return int(stops.max()) if len(stops) else 0


def _costly_first(cost: Tensor) -> Tensor:
    return cost.argsort(descending=True, stable=True)


def _on_device(device: torch.device, *tables: Tensor) -> list[Tensor]:
    """int32 copies in one allocation and one transfer, each aligned to 64 bytes."""
    sizes = [-(-table.numel() // 16) * 16 for table in tables]
    memory = torch.zeros(sum(sizes), dtype=torch.int32)
    parts = memory.split(sizes)
    for part, table in zip(parts, tables, strict=True):
        part[: table.numel()] = table.flatten()
    parts = memory.to(device).split(sizes)
    return [
        part[: table.numel()].view(table.shape) for part, table in zip(parts, tables, strict=True)
    ]
