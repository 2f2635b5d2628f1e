// Splits a batch into runs (stretches of consecutive rows of one group) and its channels into the threads' shares.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/moments.h"

namespace ssah {

struct Run {
    int64_t begin, end;  // rows
    int group;           // -1: the rows are not counted
    int64_t before;      // rows of the group already in the state when this run starts
};

// Tiles start anew at each run, so that a sequence's contribution does not depend on what else is in its batch. Advances the counts.
inline std::vector<Run> find_runs(const int8_t* group, int64_t rows, int64_t* count) {
    std::vector<Run> runs;
    for (int64_t row = 0; row < rows;) {
        int64_t end = row + 1;
        while (end < rows && group[end] == group[row]) ++end;
        const bool counted = group[row] >= 0;
        runs.push_back({row, end, group[row], counted ? count[group[row]] : 0});
        if (counted) count[group[row]] += end - row;
        row = end;
    }
    return runs;
}

// Calls work(begin, end) for shares of the channels; a share is a multiple of 64 channels, so no two threads write one cache line.
template <class Work>
void for_channel_shares(int64_t channels, int threads, const Work& work) {
    const int64_t blocks = (channels + 63) / 64;
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, blocks));
#pragma omp parallel for num_threads(int(shares)) schedule(static)
    for (int64_t i = 0; i < shares; ++i) {
        work(blocks * i / shares * 64, std::min(channels, blocks * (i + 1) / shares * 64));
    }
}

}  // namespace ssah
