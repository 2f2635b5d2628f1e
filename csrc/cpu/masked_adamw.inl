namespace ssah {
namespace SSAH_ISA {
namespace {

#include "cpu/simd.inl"

#include "common/masked_adamw.inl"

// One vector of V (vf, or vd for float64 weights) from elements of another type.
SSAH_FN vf load(const float* p, vf) {
    return load_raw<vf>(p);
}
SSAH_FN vf load(const bf16* p, vf) {
    return bits<vf>(widen_u16(load_raw<vh>(p)) << 16);
}
SSAH_FN vf load(const f16* p, vf) {
    return widen_f16(load_raw<vh>(p));
}
SSAH_FN vf load(const double* p, vf) {
    return narrow(load_raw<vd>(p), load_raw<vd>(p + lanes<vd>));
}
SSAH_FN vd load(const double* p, vd) {
    return load_raw<vd>(p);
}
template <class T>
SSAH_FN vd load(const T* p, vd) {
    T half[SSAH_WIDTH] = {};  // a vector of floats is twice as long as one of doubles
    std::copy_n(p, lanes<vd>, half);
    return widen_half<0>(load(half, vf{}));
}

template <class V>
SSAH_FN V load_as(DType type, const void* data, int64_t i) {
    switch (type) {
        case DType::f32:
            return load(static_cast<const float*>(data) + i, V{});
        case DType::bf16:
            return load(static_cast<const bf16*>(data) + i, V{});
        case DType::f16:
            return load(static_cast<const f16*>(data) + i, V{});
        case DType::f64:
            break;
    }
    return load(static_cast<const double*>(data) + i, V{});
}

template <class V>
SSAH_FN void store_raw(void* p, V v) {
    __builtin_memcpy(p, &v, sizeof(v));
}

// What a rounded vector is stored as, and its value.
struct Rounded16 {
    vh stored;
    vf value;
};
SSAH_FN Rounded16 rounded(bf16, vu upper) {
    return {narrow_u16(upper >> 16), bits<vf>(upper & 0xffff0000)};
}
SSAH_FN Rounded16 rounded(f16, vf v) {
    const vh h = narrow_f16(v);
    return {h, widen_f16(h)};
}
SSAH_FN Rounded16 round_nearest(bf16 type, vf v) {
    return rounded(type, round_bf16_nearest<vf, vu>(v));
}
SSAH_FN Rounded16 round_nearest(f16 type, vf v) {
    return rounded(type, v);
}
SSAH_FN Rounded16 round_stochastic(bf16 type, vf v, vu random) {
    return rounded(type, round_bf16_stochastic(v, random));
}
SSAH_FN Rounded16 round_stochastic(f16 type, vf v, vu random) {
    return rounded(type, round_f16_stochastic(v, random));
}

// Of memory that is written soon; it may lie behind the end of a tensor, therefore no pointer. Saved 5 to 15 % of a step on 7168 x 4096
// weights (Ice Lake, 2 threads, a busy machine).
SSAH_FN void prefetch(const void* p, int64_t bytes_ahead) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + bytes_ahead), 1);
}

// Elements in a row, of everything that an update touches. Null: not there.
template <class T>
struct Operands {
    using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
    T* weight;
    const char* grad;
    C *m, *v, *v_max;
    char* extra;
    T* copy;
    DType grad_type;
    uint64_t position, key;  // of the random numbers
};

SSAH_FN vu count_up() {
    vu u;
    for (int j = 0; j < SSAH_WIDTH; ++j) u[j] = j;
    return u;
}

// Elements [i, i + a vector).
template <class T, Rounding R>
SSAH_FN void update_vector(const Operands<T>& x, int64_t i, const AdamWScalars<typename Operands<T>::C>& s) {
    using V = typename Lanes<T>::V;
    V g = load_as<V>(x.grad_type, x.grad, i);
    if (s.divisor != 1) g = g / s.divisor;
    V m = load_raw<V>(x.m + i), v = load_raw<V>(x.v + i), highest = x.v_max ? load_raw<V>(x.v_max + i) : V{};
    const T* source = x.copy ? x.copy : x.weight;
    V w;
    if constexpr (R == Rounding::master) {
        w = load_raw<V>(reinterpret_cast<float*>(x.extra) + i);
    } else {
        w = load(source + i, V{});
    }
    V result = adamw(w, g, m, v, x.v_max ? &highest : nullptr, s);
    store_raw(x.m + i, m);
    store_raw(x.v + i, v);
    if (x.v_max) store_raw(x.v_max + i, highest);
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
        store_raw(x.weight + i, result);
        if (x.copy) store_raw(x.copy + i, result);
    } else {
        Rounded16 r;
        if constexpr (R == Rounding::stochastic) {
            r = round_stochastic(T{}, result, random_bits(uint32_t(x.position + i) + count_up(), x.key));
        } else if constexpr (R == Rounding::kahan) {
            T* lost = reinterpret_cast<T*>(x.extra) + i;
            result += load(lost, V{});
            r = round_nearest(T{}, w + result);
            store_raw(lost, round_nearest(T{}, result - (r.value - w)).stored);
        } else {
            r = round_nearest(T{}, result);
            if constexpr (R == Rounding::master) store_raw(reinterpret_cast<float*>(x.extra) + i, result);
        }
        store_raw(x.weight + i, r.stored);
        if (x.copy) store_raw(x.copy + i, r.stored);
    }
}

// Fewer elements than a vector, through zero-padded copies.
template <class T, Rounding R>
SSAH_FN void update_part(const Operands<T>& x, int64_t i, int n, const AdamWScalars<typename Operands<T>::C>& s) {
    using C = typename Operands<T>::C;
    constexpr int WIDTH = lanes<typename Lanes<T>::V>;
    constexpr int64_t EXTRA = R == Rounding::master ? sizeof(float) : R == Rounding::kahan ? sizeof(T) : 0;
    T weight[WIDTH] = {}, copy[WIDTH] = {};
    C m[WIDTH] = {}, v[WIDTH] = {}, v_max[WIDTH] = {};
    char grad[WIDTH * sizeof(double)] = {}, extra[WIDTH * sizeof(float)] = {};
    std::copy_n(x.weight + i, n, weight);
    std::copy_n(x.m + i, n, m);
    std::copy_n(x.v + i, n, v);
    std::copy_n(x.grad + i * item_size(x.grad_type), n * item_size(x.grad_type), grad);
    std::copy_n(x.extra + i * EXTRA, n * EXTRA, extra);
    if (x.v_max) std::copy_n(x.v_max + i, n, v_max);
    if (x.copy) std::copy_n(x.copy + i, n, copy);
    update_vector<T, R>({weight, grad, m, v, x.v_max ? v_max : nullptr, extra, x.copy ? copy : nullptr, x.grad_type, x.position + i, x.key},
                        0, s);
    std::copy_n(weight, n, x.weight + i);
    std::copy_n(m, n, x.m + i);
    std::copy_n(v, n, x.v + i);
    std::copy_n(extra, n * EXTRA, x.extra + i * EXTRA);
    if (x.v_max) std::copy_n(v_max, n, x.v_max + i);
    if (x.copy) std::copy_n(copy, n, x.copy + i);
}

template <class T, Rounding R>
SSAH_FN void update(const Operands<T>& x, int64_t n, const AdamWScalars<typename Operands<T>::C>& s) {
    constexpr int WIDTH = lanes<typename Lanes<T>::V>;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        prefetch(x.m + i, 1024);
        prefetch(x.v + i, 1024);
        update_vector<T, R>(x, i, s);
    }
    if (i < n) update_part<T, R>(x, i, int(n - i), s);
}

// A place in the region [outer, count, inner].
struct Place {
    int64_t outer, entry, inner;
};
SSAH_FN Place place_of(const AdamWTensor& t, int64_t at) {
    const int64_t entry = at / t.inner;
    return {entry / t.count, entry % t.count, at % t.inner};
}

// A place in the weight [outer, size, inner].
SSAH_FN int64_t in_weight(const AdamWTensor& t, const Place& place) {
    return (place.outer * t.size + (t.index ? t.index[place.entry] : place.entry)) * t.inner + place.inner;
}

// How many elements from here on lie side by side in the weight too, up to `most`: the rest of the entry and its neighbours.
SSAH_FN int64_t contiguous(const AdamWTensor& t, const Place& place, int64_t most) {
    int64_t length = t.inner - place.inner;
    for (int64_t j = place.entry + 1; length < most && j < t.count && t.index[j] == t.index[j - 1] + 1; ++j) length += t.inner;
    return std::min(length, most);
}

// Trained columns among the 16 from `column` on.
#if SSAH_WIDTH == 16 && defined(__x86_64__)
SSAH_FN __mmask16 trained_among(const std::vector<uint8_t>& bits, int64_t column) {
    uint64_t word;
    __builtin_memcpy(&word, &bits[column / 8], sizeof(word));
    return __mmask16(word >> column % 8);
}
SSAH_FN void pack(uint32_t* buffer, const uint32_t* row, __mmask16 trained) {
    _mm512_storeu_si512(buffer, _mm512_maskz_compress_epi32(trained, _mm512_maskz_loadu_epi32(trained, row)));
}
SSAH_FN void pack(uint16_t* buffer, const uint16_t* row, __mmask16 trained) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(trained, _mm256_maskz_loadu_epi16(trained, row));
    _mm256_storeu_si256((__m256i*)buffer, _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_compress_epi32(trained, wide)));
}
SSAH_FN void unpack(uint32_t* row, const uint32_t* buffer, __mmask16 trained) {
    _mm512_mask_storeu_epi32(row, trained, _mm512_maskz_expand_epi32(trained, _mm512_loadu_si512(buffer)));
}
SSAH_FN void unpack(uint16_t* row, const uint16_t* buffer, __mmask16 trained) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)buffer));
    _mm256_mask_storeu_epi16(row, trained, _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_expand_epi32(trained, wide)));
}
#endif

// Entries of one row, where inner is 1; a vector at a time where the instruction set can pack its lanes. With 7.5 % of 4096 fp32 columns
// frozen a step takes 1.5 times as long as with rows (2.0 times one by one); with 20 % trained it makes no difference.
template <bool BACK, class Word>
SSAH_FN void move_columns(const AdamWJob& job, int64_t entry, int64_t entries, Word* row, Word* buffer) {
    const int64_t* index = job.tensor.index + entry;
#if SSAH_WIDTH == 16 && defined(__x86_64__)
    if constexpr (sizeof(Word) <= 4) {
        const int64_t first = index[0], last = index[entries - 1];
        for (int64_t column = first / 16 * 16; column <= last; column += 16) {  // from a multiple of 16: on cache lines, if the rows are
            if (!BACK) prefetch(row + column, 4096);
            __mmask16 trained = trained_among(job.bits, column);
            if (column < first) trained &= 0xffffu << (first - column);
            if (last - column < 15) trained &= 0xffffu >> (15 - (last - column));
            if (BACK) {
                unpack(row + column, buffer, trained);
            } else {
                pack(buffer, row + column, trained);
            }
            buffer += __builtin_popcount(trained);
        }
        return;
    }
#endif
    for (int64_t j = 0; j < entries; ++j) (BACK ? row[index[j]] : buffer[j]) = BACK ? buffer[j] : row[index[j]];
}

// Copies n elements of the region from the weight's layout to a buffer (which has room for a vector more), or back.
template <bool BACK, class Word>
SSAH_FN void move(const AdamWJob& job, Place place, int64_t n, Word* weight, Word* buffer) {
    const AdamWTensor& t = job.tensor;
    while (n > 0) {
        Word* row = weight + place.outer * t.size * t.inner;
        int64_t length;
        if (t.inner == 1) {
            length = std::min(n, t.count - place.entry);
            move_columns<BACK>(job, place.entry, length, row, buffer);
            place.entry += length;
        } else {
            length = std::min(n, t.inner - place.inner);
            Word* piece = row + t.index[place.entry] * t.inner + place.inner;
            for (int64_t k = 0; k < length; ++k) (BACK ? piece[k] : buffer[k]) = BACK ? buffer[k] : piece[k];
            place.entry += 1;
        }
        place.inner = 0;
        if (place.entry == t.count) place.entry = 0, ++place.outer;
        buffer += length;
        n -= length;
    }
}

// Numbers move as words of their size.
template <bool BACK>
SSAH_FN void move_items(const AdamWJob& job, const Place& place, int64_t n, int64_t size, void* weight, void* buffer) {
    switch (size) {
        case 2:
            return move<BACK>(job, place, n, static_cast<uint16_t*>(weight), static_cast<uint16_t*>(buffer));
        case 4:
            return move<BACK>(job, place, n, static_cast<uint32_t*>(weight), static_cast<uint32_t*>(buffer));
        default:
            return move<BACK>(job, place, n, static_cast<uint64_t*>(weight), static_cast<uint64_t*>(buffer));
    }
}

// Shorter pieces go through a buffer in the first-level cache.
constexpr int64_t LONG = 64, BUFFER = 2048;

// Elements [begin, end) of the region.
template <class T, Rounding R>
SSAH_TARGET void masked_adamw_range(const AdamWJob& job, int64_t begin, int64_t end) {
    using C = typename Operands<T>::C;
    const AdamWTensor& t = job.tensor;
    const AdamWScalars<C> s = job.scalars.template as<C>();
    const int64_t grad_size = item_size(t.grad_type);
    constexpr int64_t EXTRA = R == Rounding::master ? sizeof(float) : sizeof(T);
    alignas(64) T weights[BUFFER + SSAH_WIDTH];
    alignas(64) char grads[(BUFFER + SSAH_WIDTH) * sizeof(double)];
    for (int64_t at = begin, n; at < end; at += n) {
        const Place place = place_of(t, at);
        const uint64_t position = t.offset + at;
        const bool direct = t.index == nullptr || t.inner >= LONG;
        const int64_t same_key = (int64_t(1) << 32) - int64_t(uint32_t(position));
        n = direct ? contiguous(t, place, end - at) : std::min(BUFFER, end - at);
        n = std::min(n, same_key);
        const auto after = [at](void* p, int64_t size) { return p ? static_cast<char*>(p) + at * size : nullptr; };
        Operands<T> x{static_cast<T*>(t.weight),
                      static_cast<const char*>(t.grad) + (t.compact_grad ? at : in_weight(t, place)) * grad_size,
                      reinterpret_cast<C*>(after(t.m, sizeof(C))),
                      reinterpret_cast<C*>(after(t.v, sizeof(C))),
                      reinterpret_cast<C*>(after(t.v_max, sizeof(C))),
                      after(t.extra, EXTRA),
                      reinterpret_cast<T*>(after(t.copy, sizeof(T))),
                      t.grad_type,
                      position,
                      R == Rounding::stochastic ? random_key(job.stem, position) : 0};
        if (direct) {
            x.weight += in_weight(t, place);
            update<T, R>(x, n, s);
            continue;
        }
        T* weight = x.weight;
        x.weight = weights;
        if (!x.copy) move_items<false>(job, place, n, sizeof(T), weight, weights);
        if (!t.compact_grad) {
            move_items<false>(job, place, n, grad_size, const_cast<void*>(t.grad), grads);
            x.grad = grads;
        }
        update<T, R>(x, n, s);
        move_items<true>(job, place, n, sizeof(T), weight, weights);
    }
}

template <class T>
AdamWFn of_rounding(Rounding rounding) {
    switch (rounding) {
        case Rounding::stochastic:
            return masked_adamw_range<T, Rounding::stochastic>;
        case Rounding::kahan:
            return masked_adamw_range<T, Rounding::kahan>;
        case Rounding::master:
            return masked_adamw_range<T, Rounding::master>;
        case Rounding::nearest:
            break;
    }
    return masked_adamw_range<T, Rounding::nearest>;
}

}  // namespace

AdamWFn masked_adamw_fn(DType dtype, Rounding rounding) {
    switch (dtype) {
        case DType::f32:
            return masked_adamw_range<float, Rounding::nearest>;
        case DType::bf16:
            return of_rounding<bf16>(rounding);
        case DType::f16:
            return of_rounding<f16>(rounding);
        case DType::f64:
            break;
    }
    return masked_adamw_range<double, Rounding::nearest>;
}

}  // namespace SSAH_ISA
}  // namespace ssah
