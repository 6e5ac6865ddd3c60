// How a backward of attention is shared out over tasks: by where gradients of keys meet.
#pragma once

#include "vec.h"

namespace g2r::G2R_NS {

// Blocks whose keys' gradients meet: those under one topmost run, for a share of its lanes. Where
// nothing comes back on the path there is no run, and a block is a group of its own.
struct BackwardGroup {
    i64 first, stop;   // blocks
    i64 top;           // run, -1: none
    i64 run_at, runs;  // of the list of runs by group
    i64 part, parts;   // of the top run's lanes
    double cost;
};

// Lanes [first, first + count) of a block or of a run.
struct LaneRange {
    i64 first, count;
};

// Where `lane` is, or would be, among ascending lanes.
inline i64 lower_bound(const int64_t* lanes, i64 count, i64 lane) {
    i64 low = 0, high = count;
    while (low < high) {
        const i64 middle = (low + high) / 2;
        if (lanes[middle] < lane)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Place of a lane among ascending lanes, -1: not there.
inline i64 place_of(const int64_t* lanes, i64 count, i64 lane) {
    const i64 at = lower_bound(lanes, count, lane);
    return at < count && lanes[at] == lane ? at : -1;
}

// Lanes ascend everywhere, so a share of the top run's lanes is a stretch of any block's or run's.
inline LaneRange lanes_in_part(const BackwardGroup& group, const AttentionBackward& in,
                               const int64_t* lanes, i64 count) {
    if (group.parts == 1) return {0, count};
    const Run& top = in.runs[group.top];
    const int64_t* all = in.run_lanes + top.lane_at;
    const i64 low = top.lanes * group.part / group.parts;
    const i64 high = top.lanes * (group.part + 1) / group.parts;
    const i64 first = lower_bound(lanes, count, all[low]);
    const i64 stop = high < top.lanes ? lower_bound(lanes, count, all[high]) : count;
    return {first, stop - first};
}

// Needs segments and blocks in depth-first order: the blocks under one run follow each other.
class BackwardGroups {
 public:
    explicit BackwardGroups(const AttentionBackward& in)
        : in_(in),
          run_of_(in.segment_count),
          place_(in.run_count),
          by_group_(in.run_count),
          found_(in.block_count),
          groups_(find_groups()),
          task_count_(share_out()),
          task_(task_count_) {
        i64 at = 0;
        for (i64 g = 0; g < groups_; g++)
            for (i64 part = 0; part < found_[g].parts; part++) {
                task_[at] = found_[g];
                task_[at].part = part;
                task_[at++].cost /= double(found_[g].parts);
            }
        dearest_first();
    }

    i64 tasks() const { return task_count_; }
    const BackwardGroup& task(i64 index) const { return task_[index]; }
    const Run& run(const BackwardGroup& group, i64 place) const {
        return in_.runs[by_group_[group.run_at + place]];
    }
    // Among its group's runs; -1 for a segment without one.
    i64 place_of_run(i64 segment) const {
        return run_of_[segment] < 0 ? -1 : place_[run_of_[segment]];
    }

 private:
    i64 top_run(i64 segment) const {
        i64 top = -1;
        for (i64 s = segment; s >= 0; s = in_.segments[s].parent)
            if (run_of_[s] >= 0) top = run_of_[s];
        return top;
    }

    i64 find_groups() {
        for (i64 s = 0; s < in_.segment_count; s++) run_of_[s] = -1;
        for (i64 r = 0; r < in_.run_count; r++) run_of_[in_.runs[r].segment] = r;
        i64 groups = 0;
        for (i64 b = 0; b < in_.block_count; b++) {
            const BackwardBlock& block = in_.blocks[b];
            const i64 top = top_run(block.segment);
            if (groups == 0 || top < 0 || found_[groups - 1].top != top)
                found_[groups++] = {b, b, top, 0, 0, 0, 1, 0.0};
            BackwardGroup& group = found_[groups - 1];
            group.stop = b + 1;
            if (block.count > 0)
                group.cost += double(block.count) * double(block.lanes) *
                              double(in_.positions[block.row + block.count - 1] + 1);
        }
        list_runs(groups);
        return groups;
    }

    // The runs of each group, in the order of their segments, as are the groups themselves.
    void list_runs(i64 groups) {
        i64 at = 0, group = 0;
        for (i64 s = 0; s < in_.segment_count; s++) {
            if (run_of_[s] < 0) continue;
            const i64 top = top_run(s);
            while (group < groups && in_.blocks[found_[group].stop - 1].segment < s &&
                   found_[group].top != top)
                group++;
            i64 place = 0;
            if (group < groups && found_[group].top == top) {
                if (found_[group].runs == 0) found_[group].run_at = at;
                place = found_[group].runs++;
            }
            by_group_[at++] = run_of_[s];
            place_[run_of_[s]] = place;
        }
    }

    // Whether the lanes of every block and run are lanes of the run above them.
    bool is_divisible(const BackwardGroup& group) const {
        if (group.top < 0) return false;
        const Run& top = in_.runs[group.top];
        const auto within = [&](const int64_t* lanes, i64 count) {
            for (i64 c = 0; c < count; c++)
                if (place_of(in_.run_lanes + top.lane_at, top.lanes, lanes[c]) < 0) return false;
            return true;
        };
        for (i64 b = group.first; b < group.stop; b++)
            if (!within(in_.block_lanes + in_.blocks[b].lane_at, in_.blocks[b].lanes)) return false;
        for (i64 i = 0; i < group.runs; i++)
            if (!within(in_.run_lanes + run(group, i).lane_at, run(group, i).lanes)) return false;
        return true;
    }

    // Where there are fewer groups than the threads ask for, their lanes are shared out.
    i64 share_out() {
        const i64 wanted = ceil_div(2 * pool().threads(), larger<i64>(1, groups_ * in_.kv_heads));
        i64 tasks = 0;
        for (i64 g = 0; g < groups_; g++) {
            if (wanted > 1 && is_divisible(found_[g]))
                found_[g].parts = smaller(wanted, in_.runs[found_[g].top].lanes);
            tasks += found_[g].parts;
        }
        return tasks;
    }

    void dearest_first() {
        if (task_count_ > 64 * pool().threads()) return;  // then the order hardly matters
        for (i64 i = 1; i < task_count_; i++)
            for (i64 j = i; j > 0 && task_[j - 1].cost < task_[j].cost; j--) {
                const BackwardGroup swapped = task_[j];
                task_[j] = task_[j - 1];
                task_[j - 1] = swapped;
            }
    }

    const AttentionBackward& in_;
    Array<i64> run_of_;  // by segment, -1: none
    Array<i64> place_;   // by run
    Array<i64> by_group_;
    Array<BackwardGroup> found_;
    const i64 groups_;
    const i64 task_count_;
    Array<BackwardGroup> task_;
};

}  // namespace g2r::G2R_NS
