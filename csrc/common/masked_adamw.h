// Options and per-step constants of masked_adamw, and the keys of its random numbers: what every device computes on the host, in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace ssah {

enum class Rounding : int { stochastic = 0, kahan = 1, master = 2, nearest = 3 };

struct AdamWOptions {
    double lr, beta1, beta2, eps, weight_decay;
    Rounding rounding;
    uint64_t seed;
    double divisor;  // of the gradients: the loss scale, negative to maximize; 1 costs nothing
};

// Constants of one tensor's step, in the computing type (float, or double for float64 weights).
template <class C>
struct AdamWScalars {
    C decay;  // the old weight's share in the new one or, for Kahan's sum, in the change
    C keep1, blend1, keep2, blend2;
    C step_size, inverse_root, eps, divisor;

    template <class To>
    SSAH_HD AdamWScalars<To> as() const {
        return {To(decay), To(keep1), To(blend1), To(keep2), To(blend2), To(step_size), To(inverse_root), To(eps), To(divisor)};
    }
};

// step: of the update, from 1.
inline AdamWScalars<double> adamw_scalars(const AdamWOptions& o, double step, bool change_only) {
    const double shrink = o.lr * o.weight_decay;
    return {change_only ? -shrink : 1 - shrink,         o.beta1, 1 - o.beta1, o.beta2, 1 - o.beta2, o.lr / (1 - std::pow(o.beta1, step)),
            1 / std::sqrt(1 - std::pow(o.beta2, step)), o.eps,   o.divisor};
}

// Steele, Lea & Flood (2014).
SSAH_HD inline uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

// The part of the key that a whole tensor shares; random_key adds the upper half of the position.
SSAH_HD inline uint64_t random_stem(uint64_t seed, uint64_t step, uint64_t id) {
    return splitmix64(splitmix64(splitmix64(seed) ^ step) ^ id);
}
SSAH_HD inline uint64_t random_key(uint64_t stem, uint64_t position) {
    return splitmix64(stem ^ position >> 32);
}

}  // namespace ssah
