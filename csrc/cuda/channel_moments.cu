#include "cuda/moments.cuh"

namespace ssah {
namespace {

template <class T, int CHANNELS>
struct Rows {
    static constexpr int V = CHANNELS, BATCH = 8, BLOCKS = 2;
    static constexpr bool WRITES = false;
    using A = Computed<T>;
    using Fetched = Raw<T, V>;
    const T* x;
    int64_t stride;

    __device__ __forceinline__ void to_channel(int64_t channel) { x += channel; }
    __device__ __forceinline__ Fetched fetch(int64_t row) const { return load<T, V>(x + row * stride); }
    __device__ __forceinline__ void values(const Fetched& raw, int64_t, A (&values)[V]) const {
        Wide<T> wide[V];
        widen_all<T, V>(raw, wide);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = wide[v];
    }
};

template <class T>
void channel_moments_of(const void* data, int64_t stride, const MomentsJob& job) {
    const T* x = static_cast<const T*>(data);
    if (aligned<T>(x, stride, job.channels)) {
        launch_segments(Rows<T, 16 / sizeof(T)>{x, stride}, job);
    } else {
        launch_segments(Rows<T, 1>{x, stride}, job);
    }
}

}  // namespace

void channel_moments(DType dtype, const void* x, int64_t stride, const MomentsJob& job) {
    if (job.rows == 0) return;
    switch (dtype) {
        case DType::f32:
            channel_moments_of<float>(x, stride, job);
            break;
        case DType::bf16:
            channel_moments_of<bf16>(x, stride, job);
            break;
        case DType::f16:
            channel_moments_of<f16>(x, stride, job);
            break;
        case DType::f64:
            channel_moments_of<double>(x, stride, job);
            break;
    }
    merge_moments(dtype, x, stride, job);
}

}  // namespace ssah
