// Steps along random directions that are never stored, on the CPU. Pointers only; the caller has checked every argument (ssah_fast/ops.py).
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace ssah {

// Where a contiguous tensor's directions come from: the tensor's id and the position of its first element.
struct DirectionKey {
    uint64_t id, offset;
};

// out = base + sum over k of factors[k] * (the direction of seeds[k]); out may be base. The same bits for any number of threads.
void perturb(DType dtype, void* out, const void* base, int64_t count, const std::vector<uint64_t>& seeds,
             const std::vector<double>& factors, DirectionKey key, int threads);

// Norm of the tensor divided by the norm of each direction. The same bits for any number of threads.
std::vector<double> direction_scales(DType dtype, const void* base, int64_t count, const std::vector<uint64_t>& seeds, DirectionKey key,
                                     int threads);

}  // namespace ssah
