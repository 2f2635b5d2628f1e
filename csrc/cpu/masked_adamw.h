// AdamW on a region of each of many tensors, on the CPU. Pointers only; the caller has checked every argument (ssah_fast/ops.py).
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/masked_adamw.h"

namespace ssah {

// The same bits for any number of threads.
void masked_adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options, int threads);

}  // namespace ssah
