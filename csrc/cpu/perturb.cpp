#include "cpu/perturb.h"

#include <algorithm>
#include <cmath>

#include "common/random.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"

namespace ssah {
namespace {

// Positions of the whole tensor that make a chunk, which has one key per direction and one sum: the same ones in every shard.
constexpr int64_t CHUNK = 8192;
// Stands in the place of masked_adamw's step, which never gets there: keeps the two kinds of noise apart.
constexpr uint64_t DIRECTION = uint64_t(1) << 63;

struct PerturbArgs {
    void* out;
    const void* base;
    uint64_t begin, end;          // positions of the elements
    std::vector<uint64_t> stems;  // of the directions' keys
    std::vector<double> factors;
    double* squares;  // of direction_scales, per chunk: the tensor's sum, then each direction's
};
using PerturbFn = void (*)(const PerturbArgs&, uint64_t);  // one chunk

std::vector<uint64_t> stems(const std::vector<uint64_t>& seeds, uint64_t id) {
    std::vector<uint64_t> result;
    for (uint64_t seed : seeds) result.push_back(random_stem(seed, DIRECTION, id));
    return result;
}

}  // namespace
}  // namespace ssah

#define SSAH_KERNEL_FILE "cpu/perturb.inl"
#include "cpu/for_each_isa.h"

namespace ssah {
namespace {

PerturbFn choose(DType dtype, bool scales) {
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512) return avx512::perturb_fn(dtype, scales);
    if (active_isa() == Isa::avx2) return avx2::perturb_fn(dtype, scales);
#endif
    return baseline::perturb_fn(dtype, scales);
}

uint64_t first_chunk(const PerturbArgs& a) {
    return a.begin / CHUNK;
}
int64_t chunk_count(const PerturbArgs& a) {
    return a.begin == a.end ? 0 : (a.end - 1) / CHUNK - first_chunk(a) + 1;
}

void for_chunks(const PerturbArgs& a, PerturbFn run_chunk, int threads) {
    const int64_t chunks = chunk_count(a);
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, chunks));
#pragma omp parallel for num_threads(int(shares)) schedule(static)
    for (int64_t i = 0; i < shares; ++i) {
        for (int64_t chunk = chunks * i / shares; chunk < chunks * (i + 1) / shares; ++chunk) run_chunk(a, first_chunk(a) + chunk);
    }
}

}  // namespace

void perturb(DType dtype, void* out, const void* base, int64_t count, const std::vector<uint64_t>& seeds,
             const std::vector<double>& factors, DirectionKey key, int threads) {
    const int64_t item = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    if (out != base) prefer_huge_pages(out, count * item);
    for_chunks({out, base, key.offset, key.offset + count, stems(seeds, key.id), factors, nullptr}, choose(dtype, false), threads);
}

std::vector<double> direction_scales(DType dtype, const void* base, int64_t count, const std::vector<uint64_t>& seeds, DirectionKey key,
                                     int threads) {
    PerturbArgs args{nullptr, base, key.offset, key.offset + count, stems(seeds, key.id), {}, nullptr};
    const size_t width = 1 + seeds.size();
    std::vector<double> squares(chunk_count(args) * width), total(width), scales;
    args.squares = squares.data();
    for_chunks(args, choose(dtype, true), threads);
    for (size_t i = 0; i < squares.size(); ++i) total[i % width] += squares[i];
    for (size_t k = 1; k < width; ++k) scales.push_back(std::sqrt(total[0] / total[k]));
    return scales;
}

}  // namespace ssah
