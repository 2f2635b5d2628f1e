// Squared L2 norms of the columns (axis 1) or rows (axis 0) of a weight [rows, columns] whose rows are `stride` elements apart.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ssah {

void column_norms(DType dtype, const void* weight, int64_t stride, int64_t rows, int64_t columns, int axis, double* norms, int threads);

}  // namespace ssah
