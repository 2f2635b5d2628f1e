// Pairs of standard normal numbers from a counter, for a scalar or a vector of fp32 (F) with its unsigned twin (U). The includer defines
// SSAH_FN, bits, fused (a multiply-add that rounds once), square_root (correctly rounded) and to_float (of a signed integer). Every
// operation rounds once (compile without contraction): kernels/reference.py gives the same bits.
//
// Coefficients: least-squares fits reweighted to equal ripple (Lawson), computed for this project with numpy; errors are against exact
// values.

#include "common/random.inl"

// Box & Muller (1958): sqrt(-2 ln u) (cos(pi t), sin(pi t)), t in (-1/2, 1/2), and a random sign for the cosine.
//
// t comes from the random word x, u and the sign from 2^32 / phi x, phi the golden ratio: over all x the points (t, u) form the Fibonacci
// lattice, the most even one in the plane.
template <class F, class U>
SSAH_FN void normal_pair(U pair, uint64_t key, F& even, F& odd) {
    const U x = random_bits(pair, key);

    // u = size / 2^31 = m 2^e, m from sqrt(1/2) to sqrt(2). ln m = f P(f), relative error of the fit 1.1e-6. Taking 2^-23 more than 1
    // from m keeps -2 ln u above 0 where u rounds to 1.
    const U signed_size = bits<U>(to_float(x * 0x9e3779b9u | 1)), size = signed_size & 0x7fffffff;
    const U exponent = (size - 0x4eb504f3u) & 0xff800000;
    const F f = bits<F>(size - exponent - 0x0f800000u) - 1.00000012f;
    F p = fused(f, F{} - 0.23792218f, F{} + 0.37335715f);
    p = fused(f, p, F{} - 0.40992660f);
    p = fused(f, p, F{} + 0.49819487f);
    p = fused(f, p, F{} - 0.66629016f);
    p = fused(f, p, F{} + 1.00002229f);
    p = fused(f, p, F{} - 2.00000191f);
    const F radius = square_root(fused(to_float(exponent), F{} - 0x1.62e430p-23f, f * p));

    // t takes the odd multiples of 2^-23, the same ones on both sides of 0. Errors of the fits: sine 5.9e-7, cosine 4.7e-8.
    const F t = bits<F>(x >> 9 | 0x3f800001) - 1.5f, tt = t * t;
    F s = fused(tt, F{} - 0.55463618f, F{} + 2.5418990f);
    s = fused(tt, s, F{} - 5.1671429f);
    s = fused(tt, s, F{} + 3.1415820f);
    F c = fused(tt, F{} + 0.21969679f, F{} - 1.3318802f);
    c = fused(tt, c, F{} + 4.0584121f);
    c = fused(tt, c, F{} - 4.9347930f);
    c = fused(tt, c, F{} + 0.99999994f);
    even = radius * bits<F>(bits<U>(c) ^ (signed_size & 0x80000000));
    odd = radius * (s * t);
}
