// The moments of one tile (at most 16 rows of one block of channels), in the computing type, and their merge into the float64 state.
//
// One pass over deviations from a shift: sum(x - K) and sum((x - K)^2). K is the state's mean, or the middle of the tile's first and last
// row where the state is empty; both lie so near that the squares are at most 17 times what the tile adds to M2 (9 times for the middle),
// so an offset of the data costs at most 17 roundings of the sums (Chan, Golub & LeVeque 1983, shifted data).
constexpr int TILE = 16;

// fp32 data is summed in float64 (its memory traffic leaves the time for it), 16-bit data in fp32, float64 data in float64.
struct Wide {
    vd low = {}, high = {};
};
SSAH_FN Wide operator+(const Wide& a, const Wide& b) {
    return {a.low + b.low, a.high + b.high};
}

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, float>, Wide, typename Lanes<T>::V>;

template <class T>
struct Deviations {
    typename Lanes<T>::V shift = {};
    Sum<T> sum[2] = {}, square[2] = {};  // of the even and the odd rows: half the dependency chain, half the rounding
};

template <class V>
SSAH_FN void accumulate(V& sum, V& square, V d) {
    sum += d;
    square = fma(d, d, square);
}
SSAH_FN void accumulate(Wide& sum, Wide& square, vf d) {
    accumulate(sum.low, square.low, widen_half<0>(d));
    accumulate(sum.high, square.high, widen_half<1>(d));
}

template <int PARITY, class T, class V>
SSAH_FN void add_row(Deviations<T>& dev, V x) {
    accumulate(dev.sum[PARITY], dev.square[PARITY], x - dev.shift);
}

SSAH_FN vf load_mean(vf, const double* mean) {
    return narrow(load_raw<vd>(mean), load_raw<vd>(mean + SSAH_WIDTH / 2));
}
SSAH_FN vd load_mean(vd, const double* mean) {
    return load_raw<vd>(mean);
}

// Both vectors of a block of one row.
template <class V>
struct Row {
    V first, second;
};

// Sets the shifts of both vectors of a block: for a state that has rows, and for an empty one.
template <class T>
SSAH_FN void shift_to_mean(Deviations<T>& first, Deviations<T>& second, const double* mean) {
    using V = typename Lanes<T>::V;
    first.shift = load_mean(V{}, mean);
    second.shift = load_mean(V{}, mean + lanes<V>);
    Lanes<T>::from_order(first.shift, second.shift);
}
template <class T, class V>
SSAH_FN void shift_to_middle(Deviations<T>& first, Deviations<T>& second, const Row<V>& top, const Row<V>& bottom) {
    first.shift = top.first * 0.5f + bottom.first * 0.5f;
    second.shift = top.second * 0.5f + bottom.second * 0.5f;
}

// Merges one register of float64 tile sums into the state (Chan et al. 1979). `before` rows were in the state, n come.
SSAH_FN void merge(vd shift, vd sum, vd square, int n, double before, double* mean, double* m2) {
    const double weight = n / (before + n), cross = before * weight, inverse = 1.0 / n;
    vd within = square - sum * sum * inverse;
    within = within < 0 ? vd{} : within;  // rounding of a constant channel; NaN passes through
    const vd old = load_raw<vd>(mean), old_m2 = load_raw<vd>(m2);
    const vd delta = shift + sum * inverse - old;
    const vd new_mean = old + delta * weight, new_m2 = old_m2 + (within + delta * delta * cross);
    __builtin_memcpy(mean, &new_mean, sizeof(vd));
    __builtin_memcpy(m2, &new_m2, sizeof(vd));
}
SSAH_FN void merge(vf shift, Wide sum, Wide square, int n, double before, double* mean, double* m2) {
    merge(widen_half<0>(shift), sum.low, square.low, n, before, mean, m2);
    merge(widen_half<1>(shift), sum.high, square.high, n, before, mean + lanes<vd>, m2 + lanes<vd>);
}
SSAH_FN void merge(vf shift, vf sum, vf square, int n, double before, double* mean, double* m2) {
    const Wide wide_sum{widen_half<0>(sum), widen_half<1>(sum)}, wide_square{widen_half<0>(square), widen_half<1>(square)};
    merge(shift, wide_sum, wide_square, n, before, mean, m2);
}

template <class T>
SSAH_FN void merge_block(Deviations<T>& first, Deviations<T>& second, int n, double before, double* mean, double* m2) {
    Sum<T> sum[2] = {first.sum[0] + first.sum[1], second.sum[0] + second.sum[1]};
    Sum<T> square[2] = {first.square[0] + first.square[1], second.square[0] + second.square[1]};
    if constexpr (!std::is_same_v<T, float>) {
        Lanes<T>::in_order(sum[0], sum[1]);
        Lanes<T>::in_order(square[0], square[1]);
    }
    Lanes<T>::in_order(first.shift, second.shift);
    constexpr int half = Lanes<T>::block / 2;
    merge(first.shift, sum[0], square[0], n, before, mean, m2);
    merge(second.shift, sum[1], square[1], n, before, mean + half, m2 + half);
}
