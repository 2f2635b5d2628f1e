// The tensors, options and per-step constants of masked_adamw: the same products in the same order, so the same bits,
// on the host and on a device.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/random.h"

namespace ssah {

enum class Rounding : int { stochastic = 0, kahan = 1, master = 2, nearest = 3 };

// A weight [outer, size, inner] and the entries of its middle axis that are trained; what is kept for them is [outer, count, inner].
struct AdamWTensor {
    void* weight;
    const void* grad;      // of the weight's shape or, with compact_grad, of the region's
    void *m, *v;           // float; double for float64 weights, as v_max
    void* v_max;           // null without amsgrad
    void* extra;           // Kahan: the compensation, of the weight's type; master: float
    void* copy;            // null, or the region's values: read instead of the weight and written with it
    float* step;           // advanced by one
    const int64_t* index;  // [count], sorted and unique; null: outer = size = count = 1
    int64_t outer, size, count, inner;
    DType weight_type, grad_type, copy_type;
    bool compact_grad;
    uint64_t id, offset;  // key of the random numbers; position of the first element
};

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

// By squaring, from the lowest bit of the exponent on: a libm's pow would differ from device to device.
SSAH_HD inline double power(double base, int64_t exponent) {
    double result = 1;
    for (; exponent > 0; exponent >>= 1, base *= base) {
        if (exponent & 1) result *= base;
    }
    return result;
}

// step: of the update, from 1.
SSAH_HD inline AdamWScalars<double> adamw_scalars(const AdamWOptions& o, int64_t step, bool change_only) {
    const double shrink = o.lr * o.weight_decay;
    return {change_only ? -shrink : 1 - shrink,      o.beta1, 1 - o.beta1, o.beta2, 1 - o.beta2, o.lr / (1 - power(o.beta1, step)),
            1 / std::sqrt(1 - power(o.beta2, step)), o.eps,   o.divisor};
}

// What becomes of a tensor's weights: a float copy of a 16-bit weight is its master, whatever was asked for; wider weights are not rounded.
SSAH_HD inline Rounding resolve_rounding(AdamWTensor& t, Rounding asked) {
    if (t.weight_type == DType::f32 || t.weight_type == DType::f64) return Rounding::nearest;
    if (t.copy == nullptr || t.copy_type != DType::f32) return asked;
    t.extra = t.copy;
    t.copy = nullptr;
    return Rounding::master;
}

}  // namespace ssah
