// The moments of segments of rows, each by one block, into the workspace; merge_moments.cu takes them from there into the state.
//
// A warp takes every eighth tile of 16 rows of its segment, each lane V adjacent channels. A tile's deviations from the middle of its first
// two rows are summed, in float for 16-bit data and in double for wider data; their squares are at most 9 times what the tile adds to M2,
// as in cpu/tile.inl. The sums are then moved, in double, to the shift of the warp's and of the segment's first tile.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/moments.h"
#include "cuda/segments.cuh"

namespace ssah {

constexpr int TILE = 16, WARPS = 8;
constexpr int SLOTS = 7;  // segments of a window that have room in the workspace; merge_moments.cu computes any more by itself

// What a slot holds. Behind a window's slots there is one more entry, with MORE rows where the window has more segments.
struct Entry {
    int rows, group;
};
constexpr int ENTRIES = SLOTS + 1, MORE = -1;

struct Workspace {
    int64_t* before;   // [128]: the counts of rows before this call
    Entry* entries;    // [windows, ENTRIES]
    double* partials;  // [windows, SLOTS, 2, channels]: mean and M2
};
inline int64_t windows_of(int64_t rows) {
    return (rows + WINDOW - 1) / WINDOW;
}
inline Workspace workspace_of(const MomentsJob& job) {
    int64_t* before = static_cast<int64_t*>(job.workspace);
    Entry* entries = reinterpret_cast<Entry*>(before + 128);
    return {before, entries, reinterpret_cast<double*>(entries + windows_of(job.rows) * ENTRIES)};
}

// ---- rows of V channels

template <class T>
using Computed = std::conditional_t<sizeof(T) == 2, float, double>;

template <class T, int V>
using Raw = std::conditional_t<V == 1, T, uint4>;

// Two 16-bit numbers in a word: fewer instructions than one by one.
SSAH_FN void widen_pair(bf16, uint32_t word, float& low, float& high) {
    low = bits<float>(word << 16);
    high = bits<float>(word & 0xffff0000);
}
SSAH_FN void widen_pair(f16, uint32_t word, float& low, float& high) {
    low = widen(f16{uint16_t(word)});
    high = widen(f16{uint16_t(word >> 16)});
}
template <class T>
SSAH_FN uint32_t narrow_pair(T, float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t word;
    if constexpr (std::is_same_v<T, bf16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
#else
    return narrow(T{}, low).bits | uint32_t(narrow(T{}, high).bits) << 16;
#endif
}

// The type that an element is worked on in: float, or double for double.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, int V>
SSAH_FN void widen_all(const Raw<T, V>& raw, Wide<T> (&x)[V]) {
    static_assert(sizeof(raw) == V * sizeof(T), "one element or 16 bytes");
    if constexpr (V == 1) {
        x[0] = widen(raw);
    } else if constexpr (sizeof(T) == 2) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) widen_pair(T{}, words[i], x[2 * i], x[2 * i + 1]);
    } else {
        memcpy(x, &raw, sizeof(raw));
    }
}
template <class T, int V>
SSAH_FN Raw<T, V> narrow_all(const Wide<T> (&x)[V]) {
    Raw<T, V> raw;
    if constexpr (V == 1) {
        raw = narrow(T{}, x[0]);
    } else if constexpr (sizeof(T) == 2) {
        raw = {narrow_pair(T{}, x[0], x[1]), narrow_pair(T{}, x[2], x[3]), narrow_pair(T{}, x[4], x[5]), narrow_pair(T{}, x[6], x[7])};
    } else {
        memcpy(&raw, x, sizeof(raw));
    }
    return raw;
}
template <class T, int V>
SSAH_FN Raw<T, V> load(const T* p) {
    return *reinterpret_cast<const Raw<T, V>*>(p);
}

// Whether 16 bytes can move at once everywhere.
template <class T>
bool aligned(const void* data, int64_t stride, int64_t channels) {
    constexpr int V = 16 / sizeof(T);
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % V == 0 && channels % V == 0;
}

// ---- sums

// The sum of deviations from `shift` and of their squares.
template <class A>
struct Sums {
    A shift;
    double sum, square;
};

// The sums of a total and of n other rows, which are moved to the total's shift.
template <class A>
SSAH_FN Sums<A> add_sums(const Sums<A>& total, int n, const Sums<A>& other) {
    const double e = double(other.shift) - double(total.shift), moved = n * e;
    return {total.shift, total.sum + (other.sum + moved), total.square + fma(e, 2 * other.sum + moved, other.square)};
}

template <class A, int V>
struct Tile {
    A shift[V], sum[V] = {}, square[V] = {};
};

// Two rows first meet each other, then the sum: half the dependency chain, half the rounding.
template <class A, int V>
SSAH_FN void add_rows(Tile<A, V>& tile, const A (&first)[V], const A (&second)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const A d = first[v] - tile.shift[v], e = second[v] - tile.shift[v];
        tile.sum[v] += d + e;
        tile.square[v] += fma(d, d, e * e);
    }
}

// n rows of a Source, from `row` on. The shift is the middle of the first two. WHOLE: n is TILE, known when compiled.
template <bool WHOLE, class Source>
SSAH_FN Tile<typename Source::A, Source::V> tile_of(const Source& source, int64_t row, int n) {
    constexpr int V = Source::V, BATCH = WHOLE ? Source::BATCH : 4;  // rows that are loaded before the first is worked on
    Tile<typename Source::A, V> tile;
#pragma unroll 1
    for (int i = 0; i < (WHOLE ? TILE : n); i += BATCH) {
        typename Source::Fetched fetched[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) fetched[j] = source.fetch(row + (WHOLE ? i + j : min(i + j, n - 1)));
#pragma unroll
        for (int j = 0; j < BATCH; j += 2) {
            if (!WHOLE && i + j >= n) break;
            const bool is_pair = WHOLE || i + j + 1 < n;
            typename Source::A even[V], odd[V];
            source.values(fetched[j], row + i + j, even);
            if (is_pair) source.values(fetched[j + 1], row + i + j + 1, odd);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (i + j == 0) tile.shift[v] = is_pair ? 0.5f * even[v] + 0.5f * odd[v] : even[v];
                if (!is_pair) odd[v] = tile.shift[v];  // adds nothing
            }
            add_rows(tile, even, odd);
        }
    }
    return tile;
}

// How many rows of a segment are in one warp's tiles.
SSAH_FN int rows_of_warp(int rows, int warp) {
    constexpr int ROUND = WARPS * TILE;
    return rows / ROUND * TILE + min(max(rows % ROUND - warp * TILE, 0), TILE);
}

// One warp's tiles of a segment, into Totals, whose shifts are those of the first tile.
template <class Source, class Totals>
SSAH_FN void add_tiles(const Source& source, int64_t begin, int rows, int warp, Totals& totals) {
#pragma unroll 1
    for (int i = warp * TILE; i < rows; i += WARPS * TILE) {
        const int n = min(TILE, rows - i);
        const auto tile = n == TILE ? tile_of<true>(source, begin + i, n) : tile_of<false>(source, begin + i, n);
        asm volatile("" ::: "memory");  // or the compiler loads the totals before the tile and keeps 40 registers for them
#pragma unroll
        for (int v = 0; v < Source::V; ++v) {
            Sums<typename Source::A> sums{tile.shift[v], double(tile.sum[v]), double(tile.square[v])};
            if (i >= WARPS * TILE) sums = add_sums(totals.get(v), n, sums);
            totals.set(v, sums);
        }
    }
}

struct Moments {
    double mean, m2;
};
template <class A>
SSAH_FN Moments moments_of(const Sums<A>& total, int rows) {
    const double mean = total.sum / rows, m2 = total.square - total.sum * mean;
    return {double(total.shift) + mean, m2 < 0 ? 0 : m2};  // below 0: rounding of a nearly constant channel; NaN passes through
}

// ---- the kernel

// The warps' sums of 32 * V channels. In shared memory from tile to tile: in registers they would take 40 of each thread.
template <class A, int V>
struct Board {
    static constexpr int WIDTH = 32 + 4;  // thread c reads channel c: without the 4, eight lanes would share a bank
    A shift[WARPS][V][WIDTH];
    double sum[WARPS][V][WIDTH], square[WARPS][V][WIDTH];

    __device__ __forceinline__ Sums<A> at(int warp, int v, int lane) const {
        return {shift[warp][v][lane], sum[warp][v][lane], square[warp][v][lane]};
    }
    __device__ __forceinline__ Moments moments(int channel, int rows) const {
        Sums<A> total = at(0, channel % V, channel / V);
        for (int warp = 1; warp < WARPS && warp * TILE < rows; ++warp) {
            total = add_sums(total, rows_of_warp(rows, warp), at(warp, channel % V, channel / V));
        }
        return moments_of(total, rows);
    }
};

// One thread's part of a board.
template <class A, int V>
struct Totals {
    Board<A, V>& board;

    __device__ __forceinline__ Sums<A> get(int v) const { return board.at(threadIdx.x / 32, v, lane()); }
    __device__ __forceinline__ void set(int v, const Sums<A>& sums) const {
        board.shift[threadIdx.x / 32][v][lane()] = sums.shift;
        board.sum[threadIdx.x / 32][v][lane()] = sums.sum;
        board.square[threadIdx.x / 32][v][lane()] = sums.square;
    }
};

// How many blocks share the channels of a window.
SSAH_HD inline unsigned blocks_of(int64_t channels, int v) {
    return channels == 0 ? 1 : unsigned((channels + 32 * v - 1) / (32 * v));
}

// One block per window and 32 * V channels. A Source says how rows are read (and, for gated_moments, written).
template <class Source>
__global__ void __launch_bounds__(32 * WARPS, Source::BLOCKS)
    segment_moments(Source source, const int8_t* group, int64_t rows, int64_t channels, const int64_t* count, int groups, Workspace work) {
    constexpr int V = Source::V;
    using A = typename Source::A;
    __shared__ Board<A, V> board;
    const unsigned blocks = blocks_of(channels, V);
    const int64_t window = blockIdx.x / blocks, first = int64_t(blockIdx.x % blocks) * (32 * V);
    const bool keeps_entries = first == 0 && threadIdx.x == 0;
    Entry* const entries = work.entries + window * ENTRIES;
    // The kernel that merges changes the counts, so it needs a copy.
    if (blockIdx.x == 0 && threadIdx.x < groups) work.before[threadIdx.x] = count[threadIdx.x];

    const bool has_channels = first + lane() * V < channels;
    source.to_channel(has_channels ? first + lane() * V : 0);
    int slot = 0;
    for_each_segment(group, rows, window, [&](int64_t begin, int n, int8_t id) {
        const bool counted = id >= 0 && slot < SLOTS;
        if (counted || Source::WRITES) {
            Totals<A, V> totals{board};
            if (has_channels) add_tiles(source, begin, n, threadIdx.x / 32, totals);
            if (counted) {
                __syncthreads();
                const int channel = threadIdx.x;
                if (channel < 32 * V && first + channel < channels) {
                    double* partial = work.partials + (window * SLOTS + slot) * 2 * channels + first + channel;
                    const Moments moments = board.moments(channel, n);
                    partial[0] = moments.mean;
                    partial[channels] = moments.m2;
                }
                __syncthreads();
                if (keeps_entries) entries[slot] = {n, id};
            }
        }
        if (id >= 0) ++slot;
    });
    if (keeps_entries) {
        for (int i = slot; i < SLOTS; ++i) entries[i] = {0, -1};
        entries[SLOTS] = {slot > SLOTS ? MORE : 0, -1};
    }
}

// Takes what segment_moments left in the workspace into the state. x: the rows whose moments these are.
void merge_moments(DType dtype, const void* x, int64_t stride, const MomentsJob& job);

template <class Source>
void launch_segments(const Source& source, const MomentsJob& job) {
    const int64_t blocks = blocks_of(job.channels, Source::V) * windows_of(job.rows);
    launch(segment_moments<Source>, unsigned(blocks), 32 * WARPS, job.stream, source, job.group, job.rows, job.channels, job.state.count,
           job.groups, workspace_of(job));
}

}  // namespace ssah
