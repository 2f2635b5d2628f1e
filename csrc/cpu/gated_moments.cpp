#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/moments.h"
#include "cpu/runs.h"

namespace ssah {

struct GatedArgs {
    const void* gate;
    int64_t gate_stride;
    const void* up;
    int64_t up_stride;
    void* h;
    int64_t h_stride;
    std::vector<Run> runs;
    int64_t channels;
    MomentState state;
};
using GatedMomentsFn = void (*)(const GatedArgs&, int64_t, int64_t);

}  // namespace ssah

#define SSAH_KERNEL_FILE "cpu/gated_moments.inl"
#include "cpu/for_each_isa.h"

namespace ssah {

static GatedMomentsFn choose(DType dtype, Activation activation) {
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512) return avx512::gated_moments_fn(dtype, activation);
    if (active_isa() == Isa::avx2) return avx2::gated_moments_fn(dtype, activation);
#endif
    return baseline::gated_moments_fn(dtype, activation);
}

void gated_moments(DType dtype, Activation activation, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* h,
                   int64_t h_stride, const int8_t* group, int64_t rows, int64_t channels, MomentState state, int threads) {
    const int64_t item = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    if (h != gate && h != up && rows > 0) prefer_huge_pages(h, ((rows - 1) * h_stride + channels) * item);
    const GatedMomentsFn run_share = choose(dtype, activation);
    const GatedArgs args{gate, gate_stride, up, up_stride, h, h_stride, find_runs(group, rows, state.count), channels, state};
    for_channel_shares(channels, threads, [&](int64_t begin, int64_t end) { run_share(args, begin, end); });
}

}  // namespace ssah
