// Activations of gated MLPs, for a scalar or a vector of fp32 (F) with its unsigned twin (U). The includer defines SSAH_FN,
// bits, fma, at_least and quotient.
//
// Coefficients: least-squares fits reweighted to equal ripple (Lawson), computed for this project with mpmath; errors are against exact
// values.

// e^x, never below e^-87. e^r = 1 + r + r^2 Q(r), |r| <= ln(2)/2, relative error of the fit 3.3e-9. Above 88.72, just under ln(2^128),
// it is Inf, so that x / (1 + e^-x) goes to zero with a very negative x instead of growing with it.
template <class F, class U>
SSAH_FN F exp_floored(F x) {
    x = at_least(x, -87.0f);
    const F shifted = fma(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: the integer part lands in the low mantissa bits
    const F n = shifted - 12582912.0f;
    const F r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));  // ln(2) in two parts; the first product is exact
    const F s = r * r;
    const F q = fma(s, fma(s, F{} + 0.0013813145f, fma(r, 0.0083694188f, 0.041668456f)), fma(r, 0.16666515f, 0.49999994f));
    const F e = bits<F>(bits<U>(fma(s, q, r + 1.0f)) + (bits<U>(shifted) << 23));  // times 2^n
    return x > 88.72f ? F{} + __builtin_inff() : e;
}

// 1 + erf(z), absolute error of the fit 1.6e-8 on [-3.92, 3.92]; beyond, the fp32 result is 0 or 2. One quotient for the whole sum: where
// it nearly cancels, only the roundings of p and q are left.
template <class F>
SSAH_FN F one_plus_erf(F z) {
    const F t = z * z;
    F p = fma(t, 2.0346508e-06f, 0.00028747803f);
    p = fma(p, t, 0.0038684555f);
    p = fma(p, t, 0.053060859f);
    p = fma(p, t, 0.19276762f);
    p = fma(p, t, 1.128379f);
    F q = fma(t, 3.8069702e-05f, 0.0011881385f);
    q = fma(q, t, 0.015172554f);
    q = fma(q, t, 0.11508600f);
    q = fma(q, t, 0.5041675f);
    q = fma(q, t, 1.0f);
    F sum = quotient(fma(z, p, q), q);
    sum = z > 3.92f ? F{} + 2.0f : sum;
    return z < -3.92f ? F{} : sum;
}

template <class F, class U>
SSAH_FN F silu(F x) {
    return quotient(x, exp_floored<F, U>(-x) + 1.0f);
}

// x * Phi(x)
template <class F>
SSAH_FN F gelu(F x) {
    return x * 0.5f * one_plus_erf(x * 0.70710678f);
}

// 0.5 x (1 + tanh(y)) = x / (1 + e^(-2y)), y = sqrt(2/pi) (x + 0.044715 x^3)
template <class F, class U>
SSAH_FN F gelu_tanh(F x) {
    return quotient(x, exp_floored<F, U>(x * fma(x * x, -0.0713548163f, -1.59576912f)) + 1.0f);
}

template <class F>
SSAH_FN F relu(F x) {
    return x < 0 ? F{} : x;  // NaN stays NaN
}
