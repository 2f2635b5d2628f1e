// Per-channel moments of activation rows on the CPU. Pointers only; the caller has checked every argument (ssah_fast/ops.py).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/moments.h"

namespace ssah {

// x [rows, channels], rows `stride` elements apart; group [rows], -1 = skip.
void channel_moments(DType dtype, const void* x, int64_t stride, const int8_t* group, int64_t rows, int64_t channels, MomentState state,
                     int threads);

// h = act(gate) * up for every row, and the moments of h for the rows that have a group. h may be gate or up itself.
void gated_moments(DType dtype, Activation activation, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* h,
                   int64_t h_stride, const int8_t* group, int64_t rows, int64_t channels, MomentState state, int threads);

}  // namespace ssah
