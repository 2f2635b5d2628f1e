#include "cuda/moments.cuh"

namespace ssah {
namespace {

// The compiler's own quotient, rounded correctly, branches to where the divisor is huge or tiny and so works on one element after the
// other. For 16-bit data two units in the last place of a float are nothing: full-range, without a branch.
namespace exact {
SSAH_FN float quotient(float a, float b) {
    return a / b;
}
#include "common/activation.inl"
}  // namespace exact
namespace approximate {
SSAH_FN float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    float q;
    asm("div.full.f32 %0, %1, %2;" : "=f"(q) : "f"(a), "f"(b));
    return q;
#else
    return a / b;
#endif
}
#include "common/activation.inl"
}  // namespace approximate

template <Activation A, bool EXACT>
SSAH_FN float activate(float x) {
    if constexpr (A == Activation::silu) return EXACT ? exact::silu<float, uint32_t>(x) : approximate::silu<float, uint32_t>(x);
    if constexpr (A == Activation::gelu) return EXACT ? exact::gelu(x) : approximate::gelu(x);
    if constexpr (A == Activation::gelu_tanh)
        return EXACT ? exact::gelu_tanh<float, uint32_t>(x) : approximate::gelu_tanh<float, uint32_t>(x);
    return exact::relu(x);
}

// float64 models are for tests and references: the library's functions.
template <Activation A, bool>
SSAH_FN double activate(double x) {
    if constexpr (A == Activation::silu) return x / (1 + exp(-x));
    if constexpr (A == Activation::gelu) return 0.5 * x * (1 + erf(x * M_SQRT1_2));
    if constexpr (A == Activation::gelu_tanh) return 0.5 * x * (1 + tanh(M_2_SQRTPI * M_SQRT1_2 * (x + 0.044715 * x * x * x)));
    return x < 0 ? 0 : x;
}

// h = act(gate) * up, rounded to T after the activation and after the product, as the model's two operations round.
template <class T, Activation ACTIVATION, int CHANNELS>
struct Gated {
    static constexpr int V = CHANNELS, BATCH = 4, BLOCKS = sizeof(T) == 8 ? 1 : 2;  // the library's erf takes many registers
    static constexpr bool WRITES = true;
    using A = Computed<T>;
    struct Fetched {
        Raw<T, V> gate, up;
    };
    const T* gate;
    int64_t gate_stride;
    const T* up;
    int64_t up_stride;
    T* h;
    int64_t h_stride;

    __device__ __forceinline__ void to_channel(int64_t channel) { gate += channel, up += channel, h += channel; }
    __device__ __forceinline__ Fetched fetch(int64_t row) const {
        return {load<T, V>(gate + row * gate_stride), load<T, V>(up + row * up_stride)};
    }
    // Writes the row of h, too.
    __device__ __forceinline__ void values(const Fetched& raw, int64_t row, A (&values)[V]) const {
        Wide<T> x[V], u[V];
        widen_all<T, V>(raw.gate, x);
        widen_all<T, V>(raw.up, u);
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = activate<ACTIVATION, sizeof(T) != 2>(x[v]);
        widen_all<T, V>(narrow_all<T, V>(x), x);
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] *= u[v];
        const Raw<T, V> product = narrow_all<T, V>(x);
        *reinterpret_cast<Raw<T, V>*>(h + row * h_stride) = product;
        widen_all<T, V>(product, x);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = x[v];
    }
};

struct GatedRows {
    const void* gate;
    int64_t gate_stride;
    const void* up;
    int64_t up_stride;
    void* h;
    int64_t h_stride;
};

template <class T, Activation A, int V>
void launch_gated(const GatedRows& r, const MomentsJob& job) {
    const Gated<T, A, V> source{static_cast<const T*>(r.gate), r.gate_stride, static_cast<const T*>(r.up), r.up_stride,
                                static_cast<T*>(r.h),          r.h_stride};
    launch_segments(source, job);
}

template <class T, Activation A>
void gated_moments_of(const GatedRows& r, const MomentsJob& job) {
    const bool wide = aligned<T>(r.gate, r.gate_stride, job.channels) && aligned<T>(r.up, r.up_stride, job.channels) &&
                      aligned<T>(r.h, r.h_stride, job.channels);
    if (wide) {
        launch_gated<T, A, 16 / sizeof(T)>(r, job);
    } else {
        launch_gated<T, A, 1>(r, job);
    }
}

template <class T>
void for_activation(Activation activation, const GatedRows& r, const MomentsJob& job) {
    switch (activation) {
        case Activation::silu:
            return gated_moments_of<T, Activation::silu>(r, job);
        case Activation::gelu:
            return gated_moments_of<T, Activation::gelu>(r, job);
        case Activation::gelu_tanh:
            return gated_moments_of<T, Activation::gelu_tanh>(r, job);
        case Activation::relu:
            return gated_moments_of<T, Activation::relu>(r, job);
    }
}

}  // namespace

void gated_moments(DType dtype, Activation activation, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* h,
                   int64_t h_stride, const MomentsJob& job) {
    if (job.rows == 0) return;
    const GatedRows rows{gate, gate_stride, up, up_stride, h, h_stride};
    switch (dtype) {
        case DType::f32:
            for_activation<float>(activation, rows, job);
            break;
        case DType::bf16:
            for_activation<bf16>(activation, rows, job);
            break;
        case DType::f16:
            for_activation<f16>(activation, rows, job);
            break;
        case DType::f64:
            for_activation<double>(activation, rows, job);
            break;
    }
    merge_moments(dtype, h, h_stride, job);
}

}  // namespace ssah
