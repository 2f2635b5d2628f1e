// How rows are cut. A run of rows of one group is cut every WINDOW rows from its own start, so that a sequence gives the same bits whatever
// else is in its batch. The pieces are called segments, and the segments that begin in the same WINDOW rows belong together.
//
// The group ids lie on the device and the host never looks at them: whoever works on a window finds its segments by itself.
#pragma once

#include "cuda/scalar.h"

namespace ssah {

constexpr int WINDOW = 512;  // as many bytes as a warp loads at once
constexpr unsigned ALL_LANES = 0xffffffff;

SSAH_FN int lane() {
    return threadIdx.x % 32;
}

// The last of the warp's 512 bytes that differs from the byte which `pattern` repeats, or -1. Each lane has 16 of them.
SSAH_FN int last_other(const uint4& ids, uint32_t pattern) {
    const uint32_t other[4] = {ids.x ^ pattern, ids.y ^ pattern, ids.z ^ pattern, ids.w ^ pattern};
    int last = -1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (other[i] != 0) last = 4 * i + (31 - __clz(other[i])) / 8;
    }
    const unsigned lanes = __ballot_sync(ALL_LANES, last >= 0);
    if (lanes == 0) return -1;
    const int source = 31 - __clz(lanes);
    return 16 * source + __shfl_sync(ALL_LANES, last, source);
}

// For the first row of a window: how many rows back its run was last cut.
SSAH_FN int rows_since_cut(const int8_t* group, int64_t row) {
    constexpr int BATCH = 8;  // windows that are looked at together: long runs wait for memory once in 4096 rows
    const uint32_t pattern = uint8_t(group[row]) * 0x01010101u;
    for (int64_t end = row; end > 0; end -= BATCH * WINDOW) {
        uint4 ids[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (end > i * WINDOW) ids[i] = reinterpret_cast<const uint4*>(group + (end - (i + 1) * WINDOW))[lane()];
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (end <= i * WINDOW) break;
            const int last = last_other(ids[i], pattern);
            if (last >= 0) return WINDOW - 1 - last;
        }
    }
    return 0;
}

// The first row behind `row` that is of another group, or the limit, which is at most WINDOW rows away.
SSAH_FN int64_t run_end(const int8_t* group, int64_t row, int64_t limit) {
    constexpr int BATCH = WINDOW / 32;
    const int8_t id = group[row];
    int8_t ids[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        const int64_t at = row + 32 * i + lane();
        ids[i] = at < limit ? group[at] : id;
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        const unsigned others = __ballot_sync(ALL_LANES, ids[i] != id);
        if (others != 0) return row + 32 * i + __ffs(others) - 1;
    }
    return limit;
}

// Calls work(first row, number of rows, group) for each segment that begins in a window. For whole warps.
template <class Work>
SSAH_FN void for_each_segment(const int8_t* group, int64_t rows, int64_t window, const Work& work) {
    int64_t row = window * WINDOW;
    const int64_t end = min(row + WINDOW, rows);
    const int since = rows_since_cut(group, row);
    if (since > 0) row = run_end(group, row, min(row + WINDOW - since, rows));
    while (row < end) {
        const int64_t next = run_end(group, row, min(row + WINDOW, rows));
        work(row, int(next - row), group[row]);
        row = next;
    }
}

}  // namespace ssah
