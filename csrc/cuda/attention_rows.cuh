// Which rows a block of an attention kernel works on.
#pragma once

#include "attention.h"
#include "attention_tile.cuh"

namespace g2r::gpu {

// A tile of packed queries of one kv head, and the keys that any of them sees. Row r of a block of
// tokens is query head r % group of token r / group.
template <int rows, int keys>
struct QueryTile {
    int kv_head, group;
    int first;                      // row of q of the block's first token
    int first_row, last_row;        // of the tile; of the block
    const std::int32_t* positions;  // of the block's tokens
    int last_position;              // of the tile
    int last_key, first_key;        // the positions at which tiles of keys start

    template <typename Call>
    G2R_DEVICE QueryTile(const Call& call, int block, int tokens, int tile)
        : kv_head(block_index_x() % call.kv_heads),
          group(call.heads / call.kv_heads),
          first(block),
          first_row(tile * rows),
          last_row(tokens * group - 1),
          positions(call.positions + first),
          last_position(positions[min(first_row + rows - 1, last_row) / group]),
          last_key(last_position / keys * keys),
          first_key(max(0, positions[first_row / group] - call.window + 1) / keys * keys) {}

    // Of a row of the tile, each behind the block's last one being that again.
    template <int threads, typename Visit>
    G2R_DEVICE void for_each_row(const Visit& visit) const {
        for (int i = thread_index(); i < rows; i += threads) {
            const int row = min(first_row + i, last_row), token = row / group;
            visit(i, token, kv_head * group + row - token * group);
        }
    }
};

}  // namespace g2r::gpu
