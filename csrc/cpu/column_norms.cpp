#include "cpu/column_norms.h"

#include <algorithm>
#include <numeric>

#include "cpu/isa.h"
#include "cpu/runs.h"

namespace ssah {

using NormsFn = void (*)(const void*, int64_t, int64_t, double*, int64_t, int64_t);

}  // namespace ssah

#define SSAH_KERNEL_FILE "cpu/column_norms.inl"
#include "cpu/for_each_isa.h"

namespace ssah {

static NormsFn choose(DType dtype, int axis) {
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512) return avx512::norms_fn(dtype, axis);
    if (active_isa() == Isa::avx2) return avx2::norms_fn(dtype, axis);
#endif
    return baseline::norms_fn(dtype, axis);
}

void column_norms(DType dtype, const void* weight, int64_t stride, int64_t rows, int64_t columns, int axis, double* norms, int threads) {
    const NormsFn run_share = choose(dtype, axis);
    for_channel_shares(axis == 1 ? columns : rows, threads,
                       [&](int64_t begin, int64_t end) { run_share(weight, stride, axis == 1 ? rows : columns, norms, begin, end); });
}

}  // namespace ssah
