// Vectors of SSAH_WIDTH floats (or half as many doubles) with loads and stores for every element type; see isa.h.
//
// Arithmetic is the compiler's own vector extension, lane by lane, and multiply-adds are fused only where fma() says so
// (-ffp-contract=off): every instruction set that has a fused multiply-add gives the same bits.
#if defined(__SANITIZE_ADDRESS__)  // with its checks in every inlined copy a file takes minutes to compile
#define SSAH_FN static inline SSAH_TARGET
#else
#define SSAH_FN static inline __attribute__((always_inline)) SSAH_TARGET
#endif

using vf = float __attribute__((vector_size(4 * SSAH_WIDTH)));
using vu = uint32_t __attribute__((vector_size(4 * SSAH_WIDTH)));
using vh = uint16_t __attribute__((vector_size(2 * SSAH_WIDTH)));
using vd = double __attribute__((vector_size(4 * SSAH_WIDTH)));  // SSAH_WIDTH / 2 doubles: the same register
using vl = int64_t __attribute__((vector_size(4 * SSAH_WIDTH)));

template <class To, class From>
SSAH_FN To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <class V>
SSAH_FN V load_raw(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}

// The compiler's own 16 -> 32 bit conversion goes through two half registers; these are one instruction.
SSAH_FN vu widen_u16(vh h) {
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    return bits<vu>(_mm512_maskz_cvtepu16_epi32(0xffff, bits<__m256i>(h)));
#elif SSAH_WIDTH == 8 && defined(__x86_64__)
    return bits<vu>(_mm256_cvtepu16_epi32(bits<__m128i>(h)));
#else
    return __builtin_convertvector(h, vu);
#endif
}

// a * b + c, rounded once where the instruction set can (the SSE2 baseline rounds twice).
SSAH_FN vf fma(vf a, vf b, vf c) {
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    return bits<vf>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
#elif SSAH_WIDTH == 8 && defined(__x86_64__)
    return bits<vf>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
#elif defined(__FP_FAST_FMAF)
    for (int j = 0; j < SSAH_WIDTH; ++j) c[j] = __builtin_fmaf(a[j], b[j], c[j]);
    return c;
#else
    return a * b + c;
#endif
}
SSAH_FN vf fma(vf a, float b, float c) {
    return fma(a, vf{} + b, vf{} + c);
}
SSAH_FN vf fma(vf a, vf b, float c) {
    return fma(a, b, vf{} + c);
}
SSAH_FN vf fma(vf a, float b, vf c) {
    return fma(a, vf{} + b, c);
}
SSAH_FN vd fma(vd a, vd b, vd c) {
    return a * b + c;
}

SSAH_FN vf quotient(vf a, vf b) {
    return a / b;
}

SSAH_FN vf square_root(vf v) {
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    return bits<vf>(_mm512_maskz_sqrt_ps(0xffff, bits<__m512>(v)));
#elif SSAH_WIDTH == 8 && defined(__x86_64__)
    return bits<vf>(_mm256_sqrt_ps(bits<__m256>(v)));
#else
    for (int j = 0; j < SSAH_WIDTH; ++j) v[j] = __builtin_sqrtf(v[j]);
    return v;
#endif
}
SSAH_FN vd square_root(vd v) {
    for (int j = 0; j < SSAH_WIDTH / 2; ++j) v[j] = __builtin_sqrt(v[j]);
    return v;
}

// Of signed numbers: one instruction.
using vi = int32_t __attribute__((vector_size(4 * SSAH_WIDTH)));
template <class U>
SSAH_FN U to_integer(vf v) {
    return bits<U>(__builtin_convertvector(v, vi));
}
SSAH_FN vf to_float(vu u) {
    return __builtin_convertvector(bits<vi>(u), vf);
}

// The greater of a lane and a bound; a NaN lane stays NaN. x86's max returns its second operand for a NaN.
SSAH_FN vf at_least(vf v, float low) {
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    return bits<vf>(_mm512_maskz_max_ps(0xffff, bits<__m512>(vf{} + low), bits<__m512>(v)));
#elif SSAH_WIDTH == 8 && defined(__x86_64__)
    return bits<vf>(_mm256_max_ps(bits<__m256>(vf{} + low), bits<__m256>(v)));
#else
    return v < low ? vf{} + low : v;
#endif
}

// Lanes of two vectors alternately: a0 b0 a1 b1 ..., in place; separate() undoes it.
SSAH_FN void interleave(vf& a, vf& b) {
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 x = bits<__m512>(a), y = bits<__m512>(b);
    a = bits<vf>(_mm512_permutex2var_ps(x, low, y));
    b = bits<vf>(_mm512_permutex2var_ps(x, _mm512_add_epi32(low, _mm512_set1_epi32(8)), y));
#elif SSAH_WIDTH == 8 && defined(__x86_64__)
    const __m256 low = _mm256_unpacklo_ps(bits<__m256>(a), bits<__m256>(b));
    const __m256 high = _mm256_unpackhi_ps(bits<__m256>(a), bits<__m256>(b));
    a = bits<vf>(_mm256_permute2f128_ps(low, high, 0x20));
    b = bits<vf>(_mm256_permute2f128_ps(low, high, 0x31));
#else
    const vf x = a, y = b;
    a = vf{x[0], y[0], x[1], y[1]};
    b = vf{x[2], y[2], x[3], y[3]};
#endif
}
SSAH_FN void separate(vf& a, vf& b) {
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 x = bits<__m512>(a), y = bits<__m512>(b);
    a = bits<vf>(_mm512_permutex2var_ps(x, even, y));
    b = bits<vf>(_mm512_permutex2var_ps(x, _mm512_add_epi32(even, _mm512_set1_epi32(1)), y));
#elif SSAH_WIDTH == 8 && defined(__x86_64__)
    const __m256 low = _mm256_permute2f128_ps(bits<__m256>(a), bits<__m256>(b), 0x20);
    const __m256 high = _mm256_permute2f128_ps(bits<__m256>(a), bits<__m256>(b), 0x31);
    a = bits<vf>(_mm256_shuffle_ps(low, high, 0x88));
    b = bits<vf>(_mm256_shuffle_ps(low, high, 0xdd));
#else
    const vf x = a, y = b;
    a = vf{x[0], x[2], y[0], y[2]};
    b = vf{x[1], x[3], y[1], y[3]};
#endif
}

// One half (0 or 1) of the lanes as doubles.
template <int HALF>
SSAH_FN vd widen_half(vf v) {
    using Half = float __attribute__((vector_size(2 * SSAH_WIDTH)));
    Half half;
    __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + HALF * sizeof(half), sizeof(half));
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    return bits<vd>(_mm512_maskz_cvtps_pd(0xff, bits<__m256>(half)));
#else
    return __builtin_convertvector(half, vd);
#endif
}

// Doubles -> floats, both halves.
SSAH_FN vf narrow(vd low, vd high) {
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    const __m256 l = _mm512_maskz_cvtpd_ps(0xff, bits<__m512d>(low)), h = _mm512_maskz_cvtpd_ps(0xff, bits<__m512d>(high));
    return bits<vf>(_mm512_insertf32x8(_mm512_maskz_broadcast_f32x8(0xffff, l), h, 1));
#else
    using Half = float __attribute__((vector_size(2 * SSAH_WIDTH)));
    const Half halves[2] = {__builtin_convertvector(low, Half), __builtin_convertvector(high, Half)};
    return load_raw<vf>(halves);
#endif
}

// fp16 -> fp32 by moving the exponent: exact for subnormals too.
SSAH_FN vf widen_f16(vh h) {
#if SSAH_WIDTH == 16 && SSAH_F16C
    return bits<vf>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(h)));
#elif SSAH_F16C
    return bits<vf>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
    const vu u = widen_u16(h);
    vu magnitude = bits<vu>(bits<vf>((u & 0x7fff) << 13) * 0x1p112f);
    magnitude |= (u & 0x7c00) == 0x7c00 ? vu{} + 0x7f800000u : vu{};  // Inf and NaN
    return bits<vf>(magnitude | (u & 0x8000) << 16);
#endif
}

// fp32 -> the nearest bf16 (ties to even), still as fp32. A NaN stays NaN if its low 16 bits are zero, as they are in every NaN that comes
// from bf16 operands or from an invalid operation: adding at most 0x8000 cannot carry out of them.
SSAH_FN vf round_bf16(vf v) {
    const vu u = bits<vu>(v);
#if SSAH_WIDTH == 16 && defined(__x86_64__)  // four operations instead of five: the tie's bit as a mask
    const __mmask16 odd = _mm512_test_epi32_mask(bits<__m512i>(u), _mm512_set1_epi32(0x10000));
    const __m512i half = bits<__m512i>(u + 0x7fff);
    return bits<vf>(bits<vu>(_mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1))) & 0xffff0000);
#else
    return bits<vf>((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000);
#endif
}

SSAH_FN vh narrow_u16(vu u) {
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    return bits<vh>(_mm512_maskz_cvtepi32_epi16(0xffff, bits<__m512i>(u)));
#else
    return __builtin_convertvector(u, vh);
#endif
}

// fp32 -> fp16, to nearest even.
SSAH_FN vh narrow_f16(vf v) {
#if SSAH_WIDTH == 16 && SSAH_F16C
    return bits<vh>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif SSAH_F16C
    return bits<vh>(_mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    const vu u = bits<vu>(v), sign = u >> 16 & 0x8000;
    const vu a = u & 0x7fffffff;
    // Subnormal results: adding 0.5 lines the last kept bit up with fp32's last bit, so the addition itself rounds.
    const vu small = bits<vu>(bits<vf>(a) + 0.5f) - 0x3f000000;
    const vu normal = (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13;
    vu r = a < 0x38800000 ? small : normal;
    r = a >= 0x47800000 - 0x1000 ? vu{} + 0x7c00 : r;  // 65520 and above round to Inf
    r = a > 0x7f800000 ? vu{} + 0x7e00 : r;
    return narrow_u16(r | sign);
#endif
}

// Elements of type T are worked on in blocks of two vectors. Which channel lies in which lane is the type's own
// business between from_order() and in_order().
template <class T>
struct Lanes {  // float and double: the first vector holds the first half of the block
    using V = std::conditional_t<std::is_same_v<T, double>, vd, vf>;
    static constexpr int block = 2 * sizeof(V) / sizeof(T);
    template <int HALF>
    SSAH_FN V load(const T* p) {
        return load_raw<V>(p + HALF * block / 2);
    }
    SSAH_FN V round(V v) { return v; }             // to T, back in the computing type
    SSAH_FN void store(T* p, V first, V second) {  // of rounded values
        __builtin_memcpy(p, &first, sizeof(V));
        __builtin_memcpy(p + block / 2, &second, sizeof(V));
    }
    SSAH_FN void in_order(V&, V&) {}
    SSAH_FN void from_order(V&, V&) {}
};

// One load of a whole cache line on AVX-512: the even channels are its lanes shifted up, the odd ones its lanes with the lower half
// cleared.
template <>
struct Lanes<bf16> {
    using V = vf;
    static constexpr int block = 2 * SSAH_WIDTH;
    template <int HALF>
    SSAH_FN V load(const bf16* p) {
        const vu line = load_raw<vu>(p);
        return bits<vf>(HALF == 0 ? line << 16 : line & 0xffff0000);
    }
    SSAH_FN V round(V v) { return round_bf16(v); }
    SSAH_FN void store(bf16* p, V even, V odd) {
        const vu line = bits<vu>(even) >> 16 | bits<vu>(odd);
        __builtin_memcpy(p, &line, sizeof(line));
    }
    SSAH_FN void in_order(V& even, V& odd) { interleave(even, odd); }
    SSAH_FN void from_order(V& even, V& odd) { separate(even, odd); }
};

template <>
struct Lanes<f16> {
    using V = vf;
    static constexpr int block = 2 * SSAH_WIDTH;
    template <int HALF>
    SSAH_FN V load(const f16* p) {
        return widen_f16(load_raw<vh>(p + HALF * SSAH_WIDTH));
    }
    SSAH_FN V round(V v) { return widen_f16(narrow_f16(v)); }
    SSAH_FN void store(f16* p, V first, V second) {
        const vh h[2] = {narrow_f16(first), narrow_f16(second)};
        __builtin_memcpy(p, h, sizeof(h));
    }
    SSAH_FN void in_order(V&, V&) {}
    SSAH_FN void from_order(V&, V&) {}
};

template <class V>
constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
