#include "cuda/masked_adamw.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/scalar.h"

namespace ssah {
namespace {

#include "common/masked_adamw.inl"

// Six blocks of 128 threads fit on a multiprocessor with up to 80 registers per thread; each thread then has up to 96 bytes (16-bit
// weights) on their way from memory, 72 KB together.
constexpr int THREADS = 128, BLOCKS = 6;

// ---- vectors

// V numbers in a row, moved 16 bytes at a time where V allows.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
    T at[V];
};
template <int V, class T>
SSAH_FN Pack<T, V> load(const T* p) {
    return *reinterpret_cast<const Pack<T, V>*>(global(p));
}
template <int V, class T>
SSAH_FN void store(T* p, const Pack<T, V>& x) {
    *reinterpret_cast<Pack<T, V>*>(global(p)) = x;
}

template <class T>
struct ComputedIn {
    using type = float;
};
template <>
struct ComputedIn<double> {
    using type = double;
};

// ---- what a block knows of its tile

// In shared memory: registers are for what differs between threads.
struct Job {
    AdamWTensor tensor;
    // Rows [row, row + rows) and columns [column, column + columns) of the region.
    int64_t row, column;
    uint32_t rows, columns;
    Rounding rounding;
    AdamWScalars<double> wide;
    AdamWScalars<float> narrow;
    // The random numbers' keys: up to position `next`, and from there on. A tile has no third.
    uint64_t key[2], next;
};
SSAH_FN const AdamWScalars<float>& scalars_of(const Job& job, float) {
    return job.narrow;
}
SSAH_FN const AdamWScalars<double>& scalars_of(const Job& job, double) {
    return job.wide;
}

// Where V elements in a row lie in the region and in the weight.
struct Place {
    int64_t region, weight;
};

template <int V>
SSAH_FN Place place_of(const Job& job, uint32_t group) {
    const AdamWTensor& t = job.tensor;
    uint64_t row = job.row, column = job.column;
    if (job.rows == 1) {
        column += group * V;
    } else {
        const uint32_t in_row = job.columns / V;
        row += group / in_row;
        column += group % in_row * V;
    }
    const int64_t region = row * t.count * t.inner + column;
    if (t.index == nullptr) return {region, region};
    // The compiler divides 32-bit numbers where both are.
    const uint64_t entry = t.inner == 1 ? column : column / t.inner;
    return {region, int64_t((row * t.size + *global(t.index + entry)) * t.inner + (column - entry * t.inner))};
}

// ---- one tile

template <class T>
SSAH_FN bool has_master(const Job& job) {
    return sizeof(T) == 2 && job.rounding == Rounding::master;
}

// U groups of V elements in a row: what is loaded of them before the first is worked on. What only amsgrad, Kahan's sum or a master needs
// is loaded later, or registers run out.
template <class T, int V, int U>
struct Groups {
    using C = typename ComputedIn<T>::type;
    int count;
    Place place[U];
    Pack<C, V> m[U], v[U], grad[U];
    Pack<T, V> weight[U];
};

template <class G, int V, class T, int U>
SSAH_FN void load_grads(Groups<T, V, U>& x, const AdamWTensor& t) {
    using C = typename Groups<T, V, U>::C;
#pragma unroll
    for (int u = 0; u < U; ++u) {
        if (u >= x.count) break;
        const Pack<G, V> loaded = load<V>(static_cast<const G*>(t.grad) + (t.compact_grad ? x.place[u].region : x.place[u].weight));
#pragma unroll
        for (int i = 0; i < V; ++i) x.grad[u].at[i] = C(widen(loaded.at[i]));
    }
}

template <class T, int V, int U>
SSAH_FN void load_groups(Groups<T, V, U>& x, const Job& job) {
    const AdamWTensor& t = job.tensor;
    using C = typename Groups<T, V, U>::C;
#pragma unroll
    for (int u = 0; u < U; ++u) {
        if (u >= x.count) break;
        const Place at = x.place[u];
        x.m[u] = load<V>(static_cast<const C*>(t.m) + at.region);
        x.v[u] = load<V>(static_cast<const C*>(t.v) + at.region);
        if (has_master<T>(job)) continue;
        x.weight[u] = load<V>(t.copy != nullptr ? static_cast<const T*>(t.copy) + at.region : static_cast<const T*>(t.weight) + at.weight);
    }
    switch (t.grad_type) {
        case DType::f32:
            return load_grads<float>(x, t);
        case DType::bf16:
            return load_grads<bf16>(x, t);
        case DType::f16:
            return load_grads<f16>(x, t);
        case DType::f64:
            if constexpr (sizeof(double) * V <= 16) return load_grads<double>(x, t);
    }
}

SSAH_FN bf16 round_nearest(bf16, float w) {
    return {uint16_t(round_bf16_nearest<float, uint32_t>(w) >> 16)};
}
SSAH_FN f16 round_nearest(f16, float w) {
    return narrow_f16(w);
}
SSAH_FN bf16 round_stochastic(bf16, float w, uint32_t random) {
    return {uint16_t(round_bf16_stochastic(w, random) >> 16)};
}
SSAH_FN f16 round_stochastic(f16, float w, uint32_t random) {
    return narrow_f16(round_f16_stochastic(w, random));
}

// From the new weights of a group (their changes, for Kahan's sum) to what is stored.
template <class T, int V>
SSAH_FN Pack<T, V> rounded(const Pack<float, V>& w, const Pack<float, V>& old, int64_t region, const Job& job) {
    Pack<T, V> result;
    if (job.rounding == Rounding::stochastic) {
        const uint64_t position = job.tensor.offset + region, key = job.key[position >= job.next];
#pragma unroll
        for (int i = 0; i < V; ++i) result.at[i] = round_stochastic(T{}, w.at[i], random_bits(uint32_t(position) + i, key));
    } else if (job.rounding == Rounding::kahan) {
        T* const extra = static_cast<T*>(job.tensor.extra) + region;
        Pack<T, V> lost = load<V>(extra);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float change = w.at[i] + widen(lost.at[i]);
            result.at[i] = round_nearest(T{}, old.at[i] + change);
            lost.at[i] = round_nearest(T{}, change - (widen(result.at[i]) - old.at[i]));
        }
        store<V>(extra, lost);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) result.at[i] = round_nearest(T{}, w.at[i]);
        if (job.rounding == Rounding::master) store<V>(static_cast<float*>(job.tensor.extra) + region, w);
    }
    return result;
}

template <class T, int V, int U>
SSAH_FN void update_group(Groups<T, V, U>& x, int u, const Job& job) {
    using C = typename Groups<T, V, U>::C;
    const AdamWTensor& t = job.tensor;
    const AdamWScalars<C>& s = scalars_of(job, C{});
    const Place at = x.place[u];
    Pack<C, V>&m = x.m[u], &v = x.v[u], &g = x.grad[u], old, w;
    if (has_master<T>(job)) {
        old = load<V>(static_cast<const C*>(t.extra) + at.region);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) old.at[i] = widen(x.weight[u].at[i]);
    }
    if (s.divisor != 1) {
#pragma unroll
        for (int i = 0; i < V; ++i) g.at[i] = g.at[i] / s.divisor;
    }
    if (t.v_max == nullptr) {
#pragma unroll
        for (int i = 0; i < V; ++i) w.at[i] = adamw<C>(old.at[i], g.at[i], m.at[i], v.at[i], nullptr, s);
    } else {
        C* const v_max = static_cast<C*>(t.v_max) + at.region;
        Pack<C, V> highest = load<V>(v_max);
#pragma unroll
        for (int i = 0; i < V; ++i) w.at[i] = adamw(old.at[i], g.at[i], m.at[i], v.at[i], &highest.at[i], s);
        store<V>(v_max, highest);
    }
    store<V>(static_cast<C*>(t.m) + at.region, m);
    store<V>(static_cast<C*>(t.v) + at.region, v);
    Pack<T, V> stored;
    if constexpr (sizeof(T) == 2) {
        stored = rounded<T>(w, old, at.region, job);
    } else {
        stored = w;
    }
    store<V>(static_cast<T*>(t.weight) + at.weight, stored);
    if (t.copy != nullptr) store<V>(static_cast<T*>(t.copy) + at.region, stored);
}

template <class T, int V, int U>
SSAH_FN void update_tile(const Job& job) {
    const uint32_t groups = job.rows * (job.columns / V);
    for (uint32_t first = threadIdx.x; first < groups; first += U * THREADS) {
        asm volatile("" ::: "memory");  // the job stays in shared memory: with its fields in registers 1 KB of others is spilled
        Groups<T, V, U> x;
        x.count = min(U, int((groups - first + THREADS - 1) / THREADS));
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (u < x.count) x.place[u] = place_of<V>(job, first + u * THREADS);
        }
        load_groups(x, job);
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (u < x.count) update_group(x, u, job);
        }
    }
}

// Whether V elements can move at once: by their addresses, and because no piece of the weight ends between them.
template <int V>
SSAH_FN bool fits(const Job& job) {
    const AdamWTensor& t = job.tensor;
    const auto number = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    const uintptr_t any =
        number(t.weight) | number(t.grad) | number(t.m) | number(t.v) | number(t.v_max) | number(t.extra) | number(t.copy);
    const bool wide_grad = t.grad_type == DType::f64 && t.weight_type != DType::f64;  // 4 of them take too many registers
    return any % 16 == 0 && !wide_grad && t.offset % V == 0 && (t.index == nullptr ? job.columns : t.inner) % V == 0;
}

template <class T>
SSAH_FN void update(const Job& job) {
    constexpr int V = 16 / sizeof(typename ComputedIn<T>::type);
    if (fits<V>(job)) {
        update_tile<T, V, V / 2>(job);
    } else {
        update_tile<T, 1, V>(job);
    }
}

// ---- the kernel

struct AdamWArguments {
    const AdamWEntry* entries;
    const AdamWTile* tiles;
    uint32_t* started;     // blocks that have read their step; 0 between launches
    int32_t first, count;  // of the entries
    uint32_t tile_count;
    AdamWOptions options;
    const double* lr;
    const float *grad_scale, *found_inf;
};

// By value: what changes from step to step reaches the device without a copy, and a captured graph keeps it.
// N: how many tensors there is room for.
template <int N>
struct AdamWParameters {
    AdamWArguments arguments;
    uintptr_t grads[N];
};

__device__ AdamWOptions options_of(const AdamWArguments& a) {
    AdamWOptions o = a.options;
    if (a.lr != nullptr) o.lr = *a.lr;
    if (a.grad_scale != nullptr) o.divisor *= *a.grad_scale;
    return o;
}

SSAH_FN void fill(Job& job, const AdamWArguments& a, const AdamWTile& tile, const uintptr_t* grads, const AdamWOptions& options) {
    const AdamWEntry& entry = a.entries[tile.entry];
    AdamWTensor& t = job.tensor;
    t = entry.tensor;
    t.grad = reinterpret_cast<const void*>(grads[tile.entry - a.first]);
    job.rounding = resolve_rounding(t, options.rounding);
    const int64_t width = t.count * t.inner;
    const uint32_t in_row = (width + entry.tile_columns - 1) / entry.tile_columns;
    job.row = tile.number / in_row * entry.tile_rows;
    job.column = tile.number % in_row * entry.tile_columns;
    job.rows = uint32_t(min(entry.tile_rows, t.outer - job.row));
    job.columns = uint32_t(min(entry.tile_columns, width - job.column));
    const int64_t step = int64_t(*global(t.step)) + 1;
    job.wide = adamw_scalars(options, step, job.rounding == Rounding::kahan);
    job.narrow = job.wide.as<float>();
    const uint64_t stem = random_stem(options.seed, step, t.id), first = t.offset + job.row * width + job.column;
    job.next = ((first >> 32) + 1) << 32;
    job.key[0] = random_key(stem, first);
    job.key[1] = random_key(stem, job.next);
}

// Whether every other block has read its step; the steps may change then.
SSAH_FN bool is_last(const AdamWArguments& a) {
    __threadfence();
    return atomicAdd(a.started, 1u) == gridDim.x - 1;
}

SSAH_FN void advance_steps(const AdamWArguments& a) {
    for (int32_t i = threadIdx.x; i < a.count; i += THREADS) *global(a.entries[a.first + i].tensor.step) += 1;
    if (threadIdx.x == 0) *a.started = 0;
}

// One block per tile; one block where there is none.
template <int N>
__global__ void __launch_bounds__(THREADS, BLOCKS) masked_adamw_kernel(const __grid_constant__ AdamWParameters<N> parameters) {
    const AdamWArguments& a = parameters.arguments;
    const AdamWOptions options = options_of(a);
    if (options.lr == 0 || (a.found_inf != nullptr && *a.found_inf != 0)) return;
    const bool works = blockIdx.x < a.tile_count;
    __shared__ Job job;
    __shared__ bool last;
    if (threadIdx.x == 0) {
        if (works) fill(job, a, a.tiles[blockIdx.x], parameters.grads, options);
        last = is_last(a);
    }
    __syncthreads();
    if (last) advance_steps(a);
    if (!works) return;
    switch (job.tensor.weight_type) {
        case DType::f32:
            return update<float>(job);
        case DType::bf16:
            return update<bf16>(job);
        case DType::f16:
            return update<f16>(job);
        case DType::f64:
            return update<double>(job);
    }
}

// ---- on the host

// Parameters of 4 KB are what a launch always took, and room for the 291 tensors of Llama-3-8B; 32,764 bytes are the most there can be.
constexpr int FEW = (4096 - sizeof(AdamWArguments)) / sizeof(void*), MANY = (32764 - sizeof(AdamWArguments)) / sizeof(void*);

// Elements of a tile, at least: 4 rounds of a block. Larger ones keep their number, and so the table, small: at most about 2^15 tiles.
constexpr int64_t TILE = 4096, TILES = 1 << 15;

// Where pieces are shorter than SHORT elements, tiles are NARROW columns wide (1 KB of fp32 moments) and as many rows high as make up a
// tile: the rows use the same indices.
constexpr int64_t NARROW = 256, SHORT = 64;

constexpr size_t HEADER = 16;  // bytes before the entries: the count of started blocks

int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

AdamWEntry entry_of(const AdamWTensor& t, int64_t size) {
    const int64_t width = t.count * t.inner;
    if (t.outer * width == 0) return {t, 1, 1};
    const int64_t columns = std::min(width, t.inner >= SHORT ? size : divide_up(size, t.outer * NARROW) * NARROW);
    const int64_t two_keys = (int64_t(1) << 32) / width;  // rows that span fewer than 2^32 positions
    return {t, std::max<int64_t>(1, std::min({t.outer, size / columns, two_keys})), columns};
}

int64_t tile_count(const AdamWEntry& e) {
    return divide_up(e.tensor.outer, e.tile_rows) * divide_up(e.tensor.count * e.tensor.inner, e.tile_columns);
}

template <int N>
void launch_kernel(const AdamWArguments& a, const uintptr_t* grads, cudaStream_t stream) {
    AdamWParameters<N> parameters{a, {}};
    std::copy_n(grads, a.count, parameters.grads);
    launch(masked_adamw_kernel<N>, dim3(std::max(a.tile_count, 1u)), dim3(THREADS), stream, parameters);
}

}  // namespace

AdamWTable::AdamWTable(const std::vector<AdamWTensor>& tensors) : first_tile_{0} {
    int64_t total = 0;
    for (const AdamWTensor& t : tensors) total += t.outer * t.count * t.inner;
    const int64_t size = divide_up(std::max<int64_t>(total, 1), TILE * TILES) * TILE;
    for (const AdamWTensor& t : tensors) {
        entries_.push_back(entry_of(t, size));
        const int64_t count = tile_count(entries_.back());
        for (int64_t i = 0; i < count; ++i) tiles_.push_back({int32_t(entries_.size() - 1), uint32_t(i)});
        first_tile_.push_back(int64_t(tiles_.size()));
    }
}

std::vector<char> AdamWTable::bytes() const {
    std::vector<char> all(HEADER);
    const auto append = [&](const void* data, size_t size) {
        all.insert(all.end(), static_cast<const char*>(data), static_cast<const char*>(data) + size);
    };
    append(entries_.data(), entries_.size() * sizeof(AdamWEntry));
    append(tiles_.data(), tiles_.size() * sizeof(AdamWTile));
    return all;
}

void AdamWTable::launch(char* table, const std::vector<uintptr_t>& grads, const AdamWOptions& options, const double* lr,
                        const float* grad_scale, const float* found_inf, cudaStream_t stream) const {
    const int count = int(entries_.size()), most = count <= FEW ? FEW : MANY;
    for (int first = 0; first < count; first += most) {
        const int end = std::min(first + most, count);
        AdamWArguments a{};
        a.started = reinterpret_cast<uint32_t*>(table);
        a.entries = reinterpret_cast<const AdamWEntry*>(table + HEADER);
        a.tiles = reinterpret_cast<const AdamWTile*>(a.entries + count) + first_tile_[first];
        a.first = first, a.count = end - first, a.tile_count = uint32_t(first_tile_[end] - first_tile_[first]);
        a.options = options, a.lr = lr, a.grad_scale = grad_scale, a.found_inf = found_inf;
        if (most == FEW) {
            launch_kernel<FEW>(a, &grads[first], stream);
        } else {
            launch_kernel<MANY>(a, &grads[first], stream);
        }
    }
}

}  // namespace ssah
