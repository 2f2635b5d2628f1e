namespace ssah {
namespace SSAH_ISA {
namespace {

#include "cpu/simd.inl"
#include "common/activation.inl"
#include "cpu/tile.inl"

template <Activation A>
SSAH_FN vf activate(vf x) {
    if constexpr (A == Activation::silu) return silu<vf, vu>(x);
    if constexpr (A == Activation::gelu) return gelu(x);
    if constexpr (A == Activation::gelu_tanh) return gelu_tanh<vf, vu>(x);
    return relu(x);
}

// float64 models are for tests and references: libm, lane by lane.
template <Activation A>
SSAH_FN vd activate(vd v) {
    for (int j = 0; j < lanes<vd>; ++j) {
        const double x = v[j];
        if constexpr (A == Activation::silu) v[j] = x / (1 + std::exp(-x));
        if constexpr (A == Activation::gelu) v[j] = 0.5 * x * (1 + std::erf(x * M_SQRT1_2));
        if constexpr (A == Activation::gelu_tanh) v[j] = 0.5 * x * (1 + std::tanh(M_2_SQRTPI * M_SQRT1_2 * (x + 0.044715 * x * x * x)));
        if constexpr (A == Activation::relu) v[j] = x < 0 ? 0 : x;
    }
    return v;
}

// One vector of h, rounded to T after the activation and after the product, as the model's two operations round.
template <class T, Activation A, int HALF>
SSAH_FN typename Lanes<T>::V gated(const T* gate, const T* up) {
    using L = Lanes<T>;
    return L::round(L::round(activate<A>(L::template load<HALF>(gate))) * L::template load<HALF>(up));
}

// Rows of gate, up and h, and the state that they are merged into; mean is null where the rows are not counted.
template <class T>
struct GateTile {
    const T* gate;
    int64_t gate_stride;
    const T* up;
    int64_t up_stride;
    T* h;
    int64_t h_stride;
    double before;
    double *mean, *m2;
};

template <class T, Activation A>
SSAH_FN Row<typename Lanes<T>::V> gated_row(const GateTile<T>& t, int i) {
    const T *g = t.gate + i * t.gate_stride, *u = t.up + i * t.up_stride;
    return {gated<T, A, 0>(g, u), gated<T, A, 1>(g, u)};
}

template <class T, Activation A, int PARITY>
SSAH_FN void gate_row(const GateTile<T>& t, int i, Deviations<T>& first, Deviations<T>& second) {
    const auto h = gated_row<T, A>(t, i);
    Lanes<T>::store(t.h + i * t.h_stride, h.first, h.second);
    add_row<PARITY>(first, h.first);
    add_row<PARITY>(second, h.second);
}

// n rows of one block of channels.
template <class T, Activation A>
SSAH_FN void gate_tile(const GateTile<T>& t, int n) {
    Deviations<T> first, second;
    if (t.mean != nullptr && t.before == 0) {
        shift_to_middle<T>(first, second, gated_row<T, A>(t, 0), gated_row<T, A>(t, n - 1));
    } else if (t.mean != nullptr) {
        shift_to_mean<T>(first, second, t.mean);
    }
    int i = 0;
    for (; i + 2 <= n; i += 2) {
        gate_row<T, A, 0>(t, i, first, second);
        gate_row<T, A, 1>(t, i + 1, first, second);
    }
    if (i < n) gate_row<T, A, 0>(t, i, first, second);
    if (t.mean != nullptr) merge_block(first, second, n, t.before, t.mean, t.m2);
}

template <class T, Activation A>
SSAH_TARGET void gated_moments_range(const GatedArgs& a, int64_t begin, int64_t end) {
    constexpr int BLOCK = Lanes<T>::block;
    for (const Run& run : a.runs) {
        const bool counted = run.group >= 0;
        double* mean = counted ? a.state.mean + run.group * a.channels : nullptr;
        double* m2 = counted ? a.state.m2 + run.group * a.channels : nullptr;
        for (int64_t row = run.begin; row < run.end; row += TILE) {
            const int n = int(std::min<int64_t>(TILE, run.end - row));
            const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
            const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
            T* h = static_cast<T*>(a.h) + row * a.h_stride;
            const double before = double(run.before + (row - run.begin));
            int64_t c = begin;
            for (; c + BLOCK <= end; c += BLOCK) {
                gate_tile<T, A>({gate + c, a.gate_stride, up + c, a.up_stride, h + c, a.h_stride, before, counted ? mean + c : nullptr,
                                 counted ? m2 + c : nullptr},
                                n);
            }
            if (const int width = int(end - c); width > 0) {  // the last channels, fewer than a block, through zero-padded copies
                T g_copy[TILE * BLOCK] = {}, u_copy[TILE * BLOCK] = {};
                double mean_copy[BLOCK] = {}, m2_copy[BLOCK] = {};
                for (int i = 0; i < n; ++i) {
                    std::copy_n(gate + i * a.gate_stride + c, width, g_copy + i * BLOCK);
                    std::copy_n(up + i * a.up_stride + c, width, u_copy + i * BLOCK);
                }
                if (counted) std::copy_n(mean + c, width, mean_copy), std::copy_n(m2 + c, width, m2_copy);
                gate_tile<T, A>({g_copy, BLOCK, u_copy, BLOCK, g_copy, BLOCK, before, mean_copy, m2_copy}, n);
                for (int i = 0; i < n; ++i) std::copy_n(g_copy + i * BLOCK, width, h + i * a.h_stride + c);
                if (counted) std::copy_n(mean_copy, width, mean + c), std::copy_n(m2_copy, width, m2 + c);
            }
        }
    }
}

template <class T>
GatedMomentsFn for_activation(Activation activation) {
    switch (activation) {
        case Activation::silu:
            return gated_moments_range<T, Activation::silu>;
        case Activation::gelu:
            return gated_moments_range<T, Activation::gelu>;
        case Activation::gelu_tanh:
            return gated_moments_range<T, Activation::gelu_tanh>;
        case Activation::relu:
            break;
    }
    return gated_moments_range<T, Activation::relu>;
}

}  // namespace

GatedMomentsFn gated_moments_fn(DType dtype, Activation activation) {
    switch (dtype) {
        case DType::f32:
            return for_activation<float>(activation);
        case DType::bf16:
            return for_activation<bf16>(activation);
        case DType::f16:
            return for_activation<f16>(activation);
        case DType::f64:
            break;
    }
    return for_activation<double>(activation);
}

}  // namespace SSAH_ISA
}  // namespace ssah
