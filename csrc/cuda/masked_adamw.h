// AdamW on a region of each of many tensors, in one launch. Pointers only; the caller has checked every argument (ssah_fast/ops.py).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "common/masked_adamw.h"

namespace ssah {

// A tensor whose region [outer, count * inner] is cut into tiles.
struct AdamWEntry {
    AdamWTensor tensor;  // its gradient comes with each launch
    int64_t tile_rows, tile_columns;
};

// What one block does.
struct AdamWTile {
    int32_t entry;
    uint32_t number;  // of the tile in its tensor, along the rows
};

// All that stays the same from step to step, worked out on the host and kept on the device.
class AdamWTable {
  public:
    explicit AdamWTable(const std::vector<AdamWTensor>& tensors);

    // What has to lie on the device, 16-byte aligned, for launches of this table.
    std::vector<char> bytes() const;

    // One step: options.lr counts unless `lr` is given and options.divisor is multiplied by `grad_scale`; these and found_inf lie on the
    // device and may be null. More tensors than the parameters of a kernel have room for take several launches.
    void launch(char* table, const std::vector<uintptr_t>& grads, const AdamWOptions& options, const double* lr, const float* grad_scale,
                const float* found_inf, cudaStream_t stream) const;

  private:
    std::vector<AdamWEntry> entries_;
    std::vector<AdamWTile> tiles_;
    std::vector<int64_t> first_tile_;  // of each tensor, and the number of all
};

}  // namespace ssah
