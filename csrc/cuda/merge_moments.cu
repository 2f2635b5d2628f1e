#include "cuda/moments.cuh"

namespace ssah {
namespace {

constexpr int THREADS = 128;

struct Running {
    double count, mean, m2;
};

// Chan, Golub & LeVeque (1979).
SSAH_FN void merge(Running& all, int rows, const Moments& part) {
    const double weight = rows / (all.count + rows), cross = all.count * weight, delta = part.mean - all.mean;
    all.mean = fma(delta, weight, all.mean);
    all.m2 += fma(delta * delta, cross, part.m2);
    all.count += rows;
}

// One channel, read in the order of the block that segment_moments would have given the segment.
template <class T>
struct Column {
    static constexpr int V = 1, BATCH = TILE;
    using A = Computed<T>;
    using Fetched = T;
    const T* x;
    int64_t stride;

    __device__ __forceinline__ T fetch(int64_t row) const { return x[row * stride]; }
    __device__ __forceinline__ void values(T raw, int64_t, A (&value)[1]) const { value[0] = A(widen(raw)); }
};
template <class A>
struct Total {
    Sums<A> sums;
    __device__ __forceinline__ Sums<A> get(int) const { return sums; }
    __device__ __forceinline__ void set(int, const Sums<A>& other) { sums = other; }
};
template <class T>
SSAH_FN Moments column_moments(const Column<T>& column, int64_t begin, int rows) {
    Total<Computed<T>> all, warps;
#pragma unroll 1
    for (int warp = 0; warp < WARPS && warp * TILE < rows; ++warp) {
        add_tiles(column, begin, rows, warp, warps);
        all.sums = warp == 0 ? warps.sums : add_sums(all.sums, rows_of_warp(rows, warp), warps.sums);
    }
    return moments_of(all.sums, rows);
}

// The segments of a window that found no slot.
template <class T>
SSAH_FN void merge_rest(Running& all, const T* x, int64_t stride, const int8_t* group, int64_t rows, int64_t window, int own,
                        bool has_channel) {
    int slot = 0;
    for_each_segment(group, rows, window, [&](int64_t begin, int n, int8_t id) {
        if (id < 0 || slot++ < SLOTS || id != own) return;
        merge(all, n, has_channel ? column_moments(Column<T>{x, stride}, begin, n) : Moments{});
    });
}

// Of the block's THREADS entries those that concern it, in their order. Returns how many.
struct Found {
    int64_t index;
    int rows;
};
SSAH_FN int collect(const Entry& entry, int64_t index, int own, Found* found) {
    __shared__ int counts[THREADS / 32];
    const bool concerns = entry.rows == MORE || (entry.rows > 0 && entry.group == own);
    const unsigned lanes = __ballot_sync(ALL_LANES, concerns);
    if (lane() == 0) counts[threadIdx.x / 32] = __popc(lanes);
    __syncthreads();
    int place = __popc(lanes & ((1u << lane()) - 1)), number = 0;
    for (int warp = 0; warp < THREADS / 32; ++warp) {
        if (warp < threadIdx.x / 32) place += counts[warp];
        number += counts[warp];
    }
    if (concerns) found[place] = {index, entry.rows};
    __syncthreads();
    return number;
}

// One thread per channel and group.
template <class T>
__global__ void __launch_bounds__(THREADS) merge_kernel(const T* x, int64_t stride, const int8_t* group, int64_t rows, int64_t channels,
                                                        int64_t windows, MomentState state, Workspace work) {
    constexpr int BATCH = 8;
    __shared__ Found found[THREADS];
    const int own = blockIdx.y;
    const int64_t channel = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    const bool has_channel = channel < channels;
    const int64_t at = own * channels + channel;
    Running all{double(work.before[own]), has_channel ? state.mean[at] : 0, has_channel ? state.m2[at] : 0};
    for (int64_t first = 0; first < windows * ENTRIES; first += THREADS) {
        const int64_t index = first + threadIdx.x;
        const int number = collect(index < windows * ENTRIES ? work.entries[index] : Entry{0, -1}, index, own, found);
        for (int i = 0; i < number;) {
            if (found[i].rows == MORE) {
                merge_rest(all, x + channel, stride, group, rows, found[i++].index / ENTRIES, own, has_channel);
                continue;
            }
            int taken = 0;
            Moments parts[BATCH] = {};
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {  // all loads before the first merge
                if (taken < j || i + j >= number || found[i + j].rows == MORE) continue;
                taken = j + 1;
                const int64_t place = found[i + j].index, slot = place / ENTRIES * SLOTS + place % ENTRIES;
                const double* partial = work.partials + slot * 2 * channels + channel;
                if (has_channel) parts[j] = {partial[0], partial[channels]};
            }
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                if (j < taken) merge(all, found[i + j].rows, parts[j]);
            }
            i += taken;
        }
        __syncthreads();
    }
    if (has_channel) {
        state.mean[at] = all.mean;
        state.m2[at] = all.m2;
    }
    if (channel == 0) state.count[own] = int64_t(all.count);
}

template <class T>
void launch_merge(const void* x, int64_t stride, const MomentsJob& job) {
    const unsigned blocks = unsigned((job.channels + THREADS - 1) / THREADS);
    launch(merge_kernel<T>, dim3(blocks == 0 ? 1 : blocks, job.groups), THREADS, job.stream, static_cast<const T*>(x), stride, job.group,
           job.rows, job.channels, windows_of(job.rows), job.state, workspace_of(job));
}

}  // namespace

int64_t moments_workspace(int64_t rows, int64_t channels) {
    return 128 * sizeof(int64_t) + windows_of(rows) * (ENTRIES * sizeof(Entry) + SLOTS * 2 * channels * sizeof(double));
}

void merge_moments(DType dtype, const void* x, int64_t stride, const MomentsJob& job) {
    switch (dtype) {
        case DType::f32:
            return launch_merge<float>(x, stride, job);
        case DType::bf16:
            return launch_merge<bf16>(x, stride, job);
        case DType::f16:
            return launch_merge<f16>(x, stride, job);
        case DType::f64:
            return launch_merge<double>(x, stride, job);
    }
}

}  // namespace ssah
