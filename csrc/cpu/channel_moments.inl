namespace ssah {
namespace SSAH_ISA {
namespace {

#include "cpu/simd.inl"
#include "cpu/tile.inl"

template <class T>
SSAH_FN Row<typename Lanes<T>::V> load_row(const T* x) {
    return {Lanes<T>::template load<0>(x), Lanes<T>::template load<1>(x)};
}

// n rows of one block of channels.
template <class T>
SSAH_FN void add_tile(const T* x, int64_t stride, int n, double before, double* mean, double* m2) {
    using L = Lanes<T>;
    Deviations<T> first, second;
    if (before == 0) {
        shift_to_middle<T>(first, second, load_row(x), load_row(x + (n - 1) * stride));
    } else {
        shift_to_mean<T>(first, second, mean);
    }
    int i = 0;
    for (; i + 2 <= n; i += 2) {
        const T *even = x + i * stride, *odd = even + stride;
        add_row<0>(first, L::template load<0>(even));
        add_row<0>(second, L::template load<1>(even));
        add_row<1>(first, L::template load<0>(odd));
        add_row<1>(second, L::template load<1>(odd));
    }
    if (i < n) {
        add_row<0>(first, L::template load<0>(x + i * stride));
        add_row<0>(second, L::template load<1>(x + i * stride));
    }
    merge_block(first, second, n, before, mean, m2);
}

// Channels [begin, end) of all runs, in the order of the rows.
template <class T>
SSAH_TARGET void channel_moments_range(const void* data, int64_t stride, const std::vector<Run>& runs, int64_t channels, MomentState state,
                                       int64_t begin, int64_t end) {
    constexpr int BLOCK = Lanes<T>::block;
    for (const Run& run : runs) {
        if (run.group < 0) continue;
        double* mean = state.mean + run.group * channels;
        double* m2 = state.m2 + run.group * channels;
        for (int64_t row = run.begin; row < run.end; row += TILE) {
            const int n = int(std::min<int64_t>(TILE, run.end - row));
            const T* x = static_cast<const T*>(data) + row * stride;
            const double before = double(run.before + (row - run.begin));
            int64_t c = begin;
            if (n == TILE) {  // the usual case, with its loop unrolled
                for (; c + BLOCK <= end; c += BLOCK) add_tile(x + c, stride, TILE, before, mean + c, m2 + c);
            }
            for (; c + BLOCK <= end; c += BLOCK) add_tile(x + c, stride, n, before, mean + c, m2 + c);
            if (const int width = int(end - c); width > 0) {  // the last channels, fewer than a block, through zero-padded copies
                T x_copy[TILE * BLOCK] = {};
                double mean_copy[BLOCK] = {}, m2_copy[BLOCK] = {};
                for (int i = 0; i < n; ++i) std::copy_n(x + i * stride + c, width, x_copy + i * BLOCK);
                std::copy_n(mean + c, width, mean_copy);
                std::copy_n(m2 + c, width, m2_copy);
                add_tile(x_copy, BLOCK, n, before, mean_copy, m2_copy);
                std::copy_n(mean_copy, width, mean + c);
                std::copy_n(m2_copy, width, m2 + c);
            }
        }
    }
}

}  // namespace

ChannelMomentsFn channel_moments_fn(DType dtype) {
    switch (dtype) {
        case DType::f32:
            return channel_moments_range<float>;
        case DType::bf16:
            return channel_moments_range<bf16>;
        case DType::f16:
            return channel_moments_range<f16>;
        case DType::f64:
            break;
    }
    return channel_moments_range<double>;
}

}  // namespace SSAH_ISA
}  // namespace ssah
