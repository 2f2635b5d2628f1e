namespace ssah {
namespace SSAH_ISA {
namespace {

#include "cpu/simd.inl"

// a * b + c, rounded once on every instruction set. Without a fused multiply-add: the product is exact in double, its sum with c is rounded
// to odd (an inexact one becomes that neighbour whose last bit is 1), and then the second rounding is right (Boldo & Melquiond 2008).
#if defined(__x86_64__) && SSAH_WIDTH == 4
using vq = uint64_t __attribute__((vector_size(4 * SSAH_WIDTH)));
template <int HALF>
SSAH_FN vd odd_sum(vf a, vf b, vf c) {
    const vd product = widen_half<HALF>(a) * widen_half<HALF>(b), addend = widen_half<HALF>(c);
    const vd total = product + addend, part = total - product;
    const vd lost = (product - (total - part)) + (addend - part);  // Knuth's exact remainder
    const vl inexact = ((lost > 0) | (lost < 0)) & 1;              // not where the remainder is NaN, of Inf
    const vl too_large = bits<vl>(bits<vq>(bits<vl>(total) ^ bits<vl>(lost)) >> 63) & inexact;
    return bits<vd>((bits<vl>(total) - too_large) | inexact);
}
SSAH_FN vf fused(vf a, vf b, vf c) {
    return narrow(odd_sum<0>(a, b, c), odd_sum<1>(a, b, c));
}
#else
SSAH_FN vf fused(vf a, vf b, vf c) {
    return fma(a, b, c);
}
#endif

#include "common/normal.inl"

// Positions are worked on in blocks that make one vector of pairs. A block starts at a multiple of its length, so that pairs and keys (of
// 2^32 pairs) are whole in it.
constexpr int BLOCK = 2 * SSAH_WIDTH;

SSAH_FN vu pairs_from(uint64_t position) {
    vu u;
    for (int j = 0; j < SSAH_WIDTH; ++j) u[j] = j;
    return u + uint32_t(position / 2);
}

// A direction's elements: those at even and those at odd positions.
struct Noise {
    vf even, odd;
};
SSAH_FN Noise noise_at(uint64_t position, uint64_t key) {
    Noise noise;
    normal_pair<vf, vu>(pairs_from(position), key, noise.even, noise.odd);
    return noise;
}

// A direction in one chunk.
template <class C>
struct Draw {
    uint64_t key;
    C factor;
};

template <class T>
SSAH_FN void perturb_block(T* out, const T* base, uint64_t position, const Draw<float>* draws, size_t n) {
    using L = Lanes<T>;
    vf first = L::template load<0>(base), second = L::template load<1>(base);
    for (size_t k = 0; k < n; ++k) {
        Noise noise = noise_at(position, draws[k].key);
        if constexpr (!std::is_same_v<T, bf16>) interleave(noise.even, noise.odd);  // bf16's lanes are even and odd channels too
        first = fused(noise.even, vf{} + draws[k].factor, first);
        second = fused(noise.odd, vf{} + draws[k].factor, second);
    }
    L::store(out, L::round(first), L::round(second));
}
SSAH_FN void perturb_block(double* out, const double* base, uint64_t position, const Draw<double>* draws, size_t n) {
    vd total[4];
    __builtin_memcpy(total, base, sizeof(total));
    for (size_t k = 0; k < n; ++k) {
        Noise noise = noise_at(position, draws[k].key);
        interleave(noise.even, noise.odd);
        const vd direction[4] = {widen_half<0>(noise.even), widen_half<1>(noise.even), widen_half<0>(noise.odd), widen_half<1>(noise.odd)};
        for (int j = 0; j < 4; ++j) total[j] += direction[j] * draws[k].factor;
    }
    __builtin_memcpy(out, total, sizeof(total));
}

// Where a block has elements: [begin, end) of [0, BLOCK).
struct Part {
    int begin, end;
};
SSAH_FN Part part_of(uint64_t position, uint64_t begin, uint64_t end) {
    return {position < begin ? int(begin - position) : 0, position + BLOCK > end ? int(end - position) : BLOCK};
}
SSAH_FN bool whole(Part part) {
    return part.end - part.begin == BLOCK;
}

struct Span {
    uint64_t begin, end;
};
SSAH_FN Span span_of(const PerturbArgs& a, uint64_t chunk) {
    return {std::max(a.begin, chunk * CHUNK), std::min(a.end, (chunk + 1) * CHUNK)};
}

template <class T>
SSAH_TARGET void perturb_chunk(const PerturbArgs& a, uint64_t chunk) {
    using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const size_t n = a.stems.size();
    std::vector<Draw<C>> draws;
    for (size_t k = 0; k < n; ++k) draws.push_back({random_key(a.stems[k], chunk * CHUNK / 2), C(a.factors[k])});
    const Span span = span_of(a, chunk);
    for (uint64_t position = span.begin / BLOCK * BLOCK; position < span.end; position += BLOCK) {
        const Part part = part_of(position, span.begin, span.end);
        const int64_t i = position + part.begin - a.begin;
        T* out = static_cast<T*>(a.out) + i;
        const T* base = static_cast<const T*>(a.base) + i;
        if (whole(part)) {
            perturb_block(out, base, position, draws.data(), n);
        } else {
            T copy[BLOCK] = {};
            std::copy_n(base, part.end - part.begin, copy + part.begin);
            perturb_block(copy, copy, position, draws.data(), n);
            std::copy_n(copy + part.begin, part.end - part.begin, out);
        }
    }
}

// 32 running sums, of positions that are equal modulo 32: the same order of additions on every instruction set.
struct Sums {
    alignas(64) double of[32];
};
SSAH_FN void add_squares(double* sums, vd v) {
    v = load_raw<vd>(sums) + v * v;
    __builtin_memcpy(sums, &v, sizeof(v));
}
SSAH_FN void add_squares(double* sums, vf v) {
    add_squares(sums, widen_half<0>(v));
    add_squares(sums + lanes<vd>, widen_half<1>(v));
}
// Even positions in the first half of the sums, odd ones in the second.
SSAH_FN void add_squares(Sums& sums, uint64_t position, const Noise& noise) {
    double* even = sums.of + position / 2 % 16;
    add_squares(even, noise.even);
    add_squares(even + 16, noise.odd);
}
template <class T>
SSAH_FN void add_squares(Sums& sums, uint64_t position, const T* block) {
    for (int j = 0; j < BLOCK; j += Lanes<T>::block) {
        const auto first = Lanes<T>::template load<0>(block + j), second = Lanes<T>::template load<1>(block + j);
        double* natural = sums.of + (position + j) % 32;
        if constexpr (std::is_same_v<T, bf16>) {
            add_squares(sums, position, Noise{first, second});
        } else {
            add_squares(natural, first);
            add_squares(natural + lanes<decltype(first)>, second);
        }
    }
}
SSAH_FN double total(Sums& sums) {
    for (int step = 16; step > 0; step /= 2) {
        for (int j = 0; j < step; ++j) sums.of[j] += sums.of[j + step];
    }
    return sums.of[0];
}

template <class T>
SSAH_FN double base_squares(const PerturbArgs& a, const Span& span) {
    Sums sums{};
    for (uint64_t position = span.begin / BLOCK * BLOCK; position < span.end; position += BLOCK) {
        const Part part = part_of(position, span.begin, span.end);
        const T* base = static_cast<const T*>(a.base) + int64_t(position + part.begin - a.begin);
        if (whole(part)) {
            add_squares(sums, position, base);
        } else {
            T copy[BLOCK] = {};
            std::copy_n(base, part.end - part.begin, copy + part.begin);
            add_squares(sums, position, copy);
        }
    }
    return total(sums);
}

SSAH_FN double direction_squares(const Span& span, uint64_t key) {
    Sums sums{};
    for (uint64_t position = span.begin / BLOCK * BLOCK; position < span.end; position += BLOCK) {
        Noise noise = noise_at(position, key);
        const Part part = part_of(position, span.begin, span.end);
        if (!whole(part)) {
            for (int j = 0; j < BLOCK; ++j) {
                if (j >= part.begin && j < part.end) continue;
                // Not through a conditional lvalue: g++ 12 loses that assignment at -O1.
                if (j % 2 == 0) {
                    noise.even[j / 2] = 0;
                } else {
                    noise.odd[j / 2] = 0;
                }
            }
        }
        add_squares(sums, position, noise);
    }
    return total(sums);
}

template <class T>
SSAH_TARGET void squares_of_chunk(const PerturbArgs& a, uint64_t chunk) {
    const Span span = span_of(a, chunk);
    double* squares = a.squares + (chunk - a.begin / CHUNK) * (1 + a.stems.size());
    *squares++ = base_squares<T>(a, span);
    for (uint64_t stem : a.stems) *squares++ = direction_squares(span, random_key(stem, chunk * CHUNK / 2));
}

}  // namespace

PerturbFn perturb_fn(DType dtype, bool scales) {
    switch (dtype) {
        case DType::f32:
            return scales ? squares_of_chunk<float> : perturb_chunk<float>;
        case DType::bf16:
            return scales ? squares_of_chunk<bf16> : perturb_chunk<bf16>;
        case DType::f16:
            return scales ? squares_of_chunk<f16> : perturb_chunk<f16>;
        case DType::f64:
            break;
    }
    return scales ? squares_of_chunk<double> : perturb_chunk<double>;
}

}  // namespace SSAH_ISA
}  // namespace ssah
