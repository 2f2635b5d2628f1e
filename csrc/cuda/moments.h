// Per-channel moments of activation rows on the device. Pointers only; the caller has checked every argument (ssah_fast/ops.py).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/moments.h"

namespace ssah {

// The rows' groups and the state they go to, and memory of moments_workspace() bytes, 16-byte aligned as `group` is.
struct MomentsJob {
    const int8_t* group;  // [rows], -1 = skip
    int64_t rows, channels;
    MomentState state;
    int groups;
    void* workspace;
    cudaStream_t stream;
};

int64_t moments_workspace(int64_t rows, int64_t channels);

// x [rows, channels], rows `stride` elements apart.
void channel_moments(DType dtype, const void* x, int64_t stride, const MomentsJob& job);

// h = act(gate) * up for every row, and the moments of h for the rows that have a group. h may be gate or up itself.
void gated_moments(DType dtype, Activation activation, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* h,
                   int64_t h_stride, const MomentsJob& job);

}  // namespace ssah
