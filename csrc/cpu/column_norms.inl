namespace ssah {
namespace SSAH_ISA {
namespace {

#include "cpu/simd.inl"

// acc[0..lanes) += v * v, in float64.
SSAH_FN void add_squares(vd v, double* acc) {
    const vd sum = load_raw<vd>(acc) + v * v;
    __builtin_memcpy(acc, &sum, sizeof(sum));
}
SSAH_FN void add_squares(vf v, double* acc) {
    add_squares(widen_half<0>(v), acc);
    add_squares(widen_half<1>(v), acc + lanes<vd>);
}

// The same for one block of T.
template <class T>
SSAH_FN void add_block(const T* w, double* acc) {
    auto first = Lanes<T>::template load<0>(w), second = Lanes<T>::template load<1>(w);
    Lanes<T>::in_order(first, second);
    add_squares(first, acc);
    add_squares(second, acc + Lanes<T>::block / 2);
}

// Fewer elements than a block.
template <class T>
SSAH_FN void add_part(const T* w, int width, double* acc) {
    T w_copy[Lanes<T>::block] = {};
    double acc_copy[Lanes<T>::block] = {};
    std::copy_n(w, width, w_copy);
    std::copy_n(acc, width, acc_copy);
    add_block(w_copy, acc_copy);
    std::copy_n(acc_copy, width, acc);
}

// Eight rows at a time, so that the float64 sums are loaded and stored once for eight elements read; rows are added in their order.
constexpr int ROWS = 8;

template <class T>
SSAH_TARGET void columns_range(const void* data, int64_t stride, int64_t rows, double* norms, int64_t begin, int64_t end) {
    constexpr int BLOCK = Lanes<T>::block;
    std::fill(norms + begin, norms + end, 0.0);
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int n = int(std::min<int64_t>(ROWS, rows - row));
        const T* w = static_cast<const T*>(data) + row * stride;
        int64_t c = begin;
        for (; c + BLOCK <= end; c += BLOCK) {
            double acc[BLOCK];
            std::copy_n(norms + c, BLOCK, acc);
            for (int i = 0; i < n; ++i) add_block(w + i * stride + c, acc);
            std::copy_n(acc, BLOCK, norms + c);
        }
        for (int i = 0; i < n && c < end; ++i) add_part(w + i * stride + c, int(end - c), norms + c);
    }
}

// Thirty-two running sums whatever the vector's width, so that every instruction set gives the same bits.
template <class T>
SSAH_TARGET void rows_range(const void* data, int64_t stride, int64_t columns, double* norms, int64_t begin, int64_t end) {
    constexpr int BLOCK = Lanes<T>::block, SUMS = 32;
    for (int64_t row = begin; row < end; ++row) {
        const T* w = static_cast<const T*>(data) + row * stride;
        double acc[SUMS] = {};
        int64_t c = 0;
        for (; c + SUMS <= columns; c += SUMS) {
            for (int k = 0; k < SUMS; k += BLOCK) add_block(w + c + k, acc + k);
        }
        for (int k = 0; c + k < columns; k += BLOCK) add_part(w + c + k, int(std::min<int64_t>(BLOCK, columns - c - k)), acc + k);
        norms[row] = std::accumulate(acc, acc + SUMS, 0.0);
    }
}

template <class T>
NormsFn of_axis(int axis) {
    return axis == 1 ? columns_range<T> : rows_range<T>;
}

}  // namespace

NormsFn norms_fn(DType dtype, int axis) {
    switch (dtype) {
        case DType::f32:
            return of_axis<float>(axis);
        case DType::bf16:
            return of_axis<bf16>(axis);
        case DType::f16:
            return of_axis<f16>(axis);
        case DType::f64:
            break;
    }
    return of_axis<double>(axis);
}

}  // namespace SSAH_ISA
}  // namespace ssah
