// One number at a time on the device: conversions between element types, and what common/*.inl ask of their includer.
#pragma once

#include <cuda_runtime.h>

#include "common/dtype.h"

#define SSAH_FN static __device__ __forceinline__

namespace ssah {

template <class To, class From>
SSAH_FN To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// A pointer that a kernel read from memory could lead anywhere; told that it leads to global memory, the compiler writes LDG and STG.
template <class T>
SSAH_FN T* global(T* p) {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(p));
#endif
    return p;
}

// The device has instructions for fp16 <-> fp32; elsewhere (tests/cuda_on_cpu) integers do the same.
SSAH_FN float widen(f16 h) {
#ifdef __CUDA_ARCH__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
    return f;
#else
    const uint32_t u = h.bits;
    uint32_t magnitude = bits<uint32_t>(bits<float>((u & 0x7fff) << 13) * 0x1p112f);
    if ((u & 0x7c00) == 0x7c00) magnitude |= 0x7f800000;  // Inf and NaN
    return bits<float>(magnitude | (u & 0x8000) << 16);
#endif
}
SSAH_FN f16 narrow_f16(float f) {
#ifdef __CUDA_ARCH__
    f16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
    return h;
#else
    const uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return {uint16_t(0x7fff)};                   // as the device does
    if (a >= 0x47800000 - 0x1000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to Inf
    // Subnormal results: adding 0.5 lines the last kept bit up with fp32's last bit, so the addition itself rounds.
    if (a < 0x38800000) return {uint16_t(sign | (bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13)};
#endif
}

SSAH_FN float widen(float f) {
    return f;
}
SSAH_FN double widen(double d) {
    return d;
}
SSAH_FN float widen(bf16 b) {
    return bits<float>(uint32_t(b.bits) << 16);
}

// To the nearest, ties to even.
SSAH_FN bf16 narrow(bf16, float f) {
#ifdef __CUDA_ARCH__
    bf16 b;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(f));
    return b;
#else
    const uint32_t u = bits<uint32_t>(f);
    return {uint16_t(f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
#endif
}
SSAH_FN f16 narrow(f16, float f) {
    return narrow_f16(f);
}
SSAH_FN float narrow(float, float f) {
    return f;
}
SSAH_FN double narrow(double, double d) {
    return d;
}

// a * b + c, rounded once.
SSAH_FN float fma(float a, float b, float c) {
    return fmaf(a, b, c);
}
SSAH_FN double fma(double a, double b, double c) {
    return ::fma(a, b, c);
}

// The greater of a number and a bound; NaN stays NaN.
SSAH_FN float at_least(float f, float low) {
    return f < low ? low : f;
}

SSAH_FN float square_root(float f) {
    return sqrtf(f);
}
SSAH_FN double square_root(double d) {
    return sqrt(d);
}

template <class U>
SSAH_FN U to_integer(float f) {
    return U(f);
}
SSAH_FN float to_float(uint32_t u) {
    return float(u);
}

}  // namespace ssah
