// AdamW on a region of each of many tensors, on the CPU. Pointers only; the caller has checked every argument (ssah_fast/ops.py).
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/masked_adamw.h"

namespace ssah {

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

// The same bits for any number of threads.
void masked_adamw(std::vector<AdamWTensor> tensors, const AdamWOptions& options, int threads);

}  // namespace ssah
