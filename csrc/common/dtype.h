// Element types of the tensors that kernels read, and their conversions to and from fp32.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SSAH_HD __host__ __device__
#else
#define SSAH_HD
#endif

namespace ssah {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

}  // namespace ssah
