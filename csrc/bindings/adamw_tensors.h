// The tensors of masked_adamw as kernels/adamw_columns.py describes them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "bindings/ptr.h"
#include "common/masked_adamw.h"

// A column per field: for hundreds of tensors that costs less than objects would.
using AdamWColumns = std::array<std::vector<int64_t>, 18>;

inline std::vector<ssah::AdamWTensor> adamw_tensors(const AdamWColumns& c) {
    std::vector<ssah::AdamWTensor> tensors(c[0].size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        ssah::AdamWTensor& t = tensors[i];
        t.weight = ptr<void>(c[0][i]), t.m = ptr<void>(c[1][i]), t.v = ptr<void>(c[2][i]), t.v_max = ptr<void>(c[3][i]);
        t.extra = ptr<void>(c[4][i]), t.copy = ptr<void>(c[5][i]), t.step = ptr<float>(c[6][i]), t.index = ptr<int64_t>(c[7][i]);
        t.outer = c[8][i], t.size = c[9][i], t.count = c[10][i], t.inner = c[11][i];
        t.weight_type = ssah::DType(c[12][i]), t.grad_type = ssah::DType(c[13][i]), t.copy_type = ssah::DType(c[14][i]);
        t.compact_grad = c[15][i] != 0, t.id = c[16][i], t.offset = c[17][i];
    }
    return tensors;
}
