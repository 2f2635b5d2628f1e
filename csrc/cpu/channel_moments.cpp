#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/moments.h"
#include "cpu/runs.h"

namespace ssah {

using ChannelMomentsFn = void (*)(const void*, int64_t, const std::vector<Run>&, int64_t, MomentState, int64_t, int64_t);

}  // namespace ssah

#define SSAH_KERNEL_FILE "cpu/channel_moments.inl"
#include "cpu/for_each_isa.h"

namespace ssah {

static ChannelMomentsFn choose(DType dtype) {
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512) return avx512::channel_moments_fn(dtype);
    if (active_isa() == Isa::avx2) return avx2::channel_moments_fn(dtype);
#endif
    return baseline::channel_moments_fn(dtype);
}

void channel_moments(DType dtype, const void* x, int64_t stride, const int8_t* group, int64_t rows, int64_t channels, MomentState state,
                     int threads) {
    const ChannelMomentsFn run_share = choose(dtype);
    const std::vector<Run> runs = find_runs(group, rows, state.count);
    for_channel_shares(channels, threads, [&](int64_t begin, int64_t end) { run_share(x, stride, runs, channels, state, begin, end); });
}

}  // namespace ssah
