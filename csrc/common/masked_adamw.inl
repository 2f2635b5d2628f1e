// AdamW, its random bits and its roundings, for a scalar or a vector of fp32 (F) with its unsigned twin (U). The includer defines SSAH_FN,
// bits, square_root, to_integer (towards zero), to_float and narrow_f16. Every operation rounds once and none is fused (compile without
// contraction): kernels/reference.py gives the same bits.

// Returns the new weight or, with the scalars of a Kahan sum, its change. `highest` is amsgrad's running maximum, or null.
template <class F, class C>
SSAH_FN F adamw(F w, F g, F& m, F& v, F* highest, const AdamWScalars<C>& s) {
    m = m + (g - m) * s.blend1;
    v = v * s.keep2 + g * s.blend2 * g;
    F second = v;
    if (highest != nullptr) {
        second = *highest >= v ? *highest : v;
        second = *highest == *highest ? second : *highest;  // NaN stays
        *highest = second;
    }
    return w * s.decay - m * s.step_size / (square_root(second) * s.inverse_root + s.eps);
}

#include "common/random.inl"

// Where w is Inf or NaN, `rounded` would be another number: w itself, a NaN with a bit that its upper half keeps.
template <class F, class U>
SSAH_FN U unless_special(U rounded, F w) {
    const U u = bits<U>(w), magnitude = u & 0x7fffffff;
    const U special = magnitude > 0x7f800000 ? u | 0x00400000 : u;
    return magnitude < 0x7f800000 ? rounded : special;
}

// fp32 -> bf16 in the upper half of each word; the lower half is undefined.
template <class F, class U>
SSAH_FN U round_bf16_nearest(F w) {
    const U u = bits<U>(w);
    return unless_special(u + 0x7fff + (u >> 16 & 1), w);
}
template <class F, class U>
SSAH_FN U round_bf16_stochastic(F w, U random) {
    return unless_special(bits<U>(w) + (random & 0xffff), w);
}

// fp32 -> one of the two neighbours in fp16, still as fp32.
template <class F, class U>
SSAH_FN F round_f16_stochastic(F w, U random) {
    const U u = bits<U>(w), sign = u & 0x80000000;
    const F size = bits<F>(u & 0x7fffffff);
    const F normal = bits<F>(unless_special((u + (random & 0x1fff)) & ~0x1fffu, w));
    // fp16's subnormal numbers are the multiples of 2^-24.
    const F q = (size < 0x1p-14f ? size : F{}) * 0x1p24f;
    const F down = to_float(to_integer<U>(q));
    const F up = q - down > to_float(random >> 8) * 0x1p-24f ? F{} + 1.0f : F{};
    const F small = bits<F>(bits<U>((down + up) * 0x1p-24f) | sign);
    return size < 0x1p-14f ? small : normal;
}
