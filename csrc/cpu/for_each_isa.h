// Includes SSAH_KERNEL_FILE once per instruction set; see isa.h. No include guard: it is meant to be repeated.
#include <type_traits>

#include "common/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SSAH_ISA avx512
#define SSAH_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define SSAH_WIDTH 16
#define SSAH_F16C 1
#include SSAH_KERNEL_FILE
#undef SSAH_ISA
#undef SSAH_TARGET
#undef SSAH_WIDTH

#define SSAH_ISA avx2
#define SSAH_TARGET __attribute__((target("avx2,fma,f16c")))
#define SSAH_WIDTH 8
#include SSAH_KERNEL_FILE
#undef SSAH_ISA
#undef SSAH_TARGET
#undef SSAH_WIDTH
#undef SSAH_F16C
#endif

#define SSAH_ISA baseline
#define SSAH_TARGET
#define SSAH_WIDTH 4
#define SSAH_F16C 0
#include SSAH_KERNEL_FILE
#undef SSAH_ISA
#undef SSAH_TARGET
#undef SSAH_WIDTH
#undef SSAH_F16C
