#include "cpu/masked_adamw.h"

#include <algorithm>

#include "cpu/isa.h"

namespace ssah {
namespace {

// One tensor and all that its step needs.
struct AdamWJob {
    AdamWTensor tensor;
    Rounding rounding;
    AdamWScalars<double> scalars;
    uint64_t stem;
    int64_t begin, end;         // among the elements of all tensors
    std::vector<uint8_t> bits;  // of columns (inner = 1): one for each, set where it is trained, and 8 bytes of zeros
};
using AdamWFn = void (*)(const AdamWJob&, int64_t, int64_t);

int64_t item_size(DType type) {
    return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
}

}  // namespace
}  // namespace ssah

#define SSAH_KERNEL_FILE "cpu/masked_adamw.inl"
#include "cpu/for_each_isa.h"

namespace ssah {
namespace {

AdamWFn choose(DType dtype, Rounding rounding) {
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512) return avx512::masked_adamw_fn(dtype, rounding);
    if (active_isa() == Isa::avx2) return avx2::masked_adamw_fn(dtype, rounding);
#endif
    return baseline::masked_adamw_fn(dtype, rounding);
}

std::vector<uint8_t> bitmap(const AdamWTensor& t) {
    std::vector<uint8_t> bits(t.size / 8 + 1 + sizeof(uint64_t));
    for (int64_t j = 0; j < t.count; ++j) bits[t.index[j] / 8] |= 1 << t.index[j] % 8;
    return bits;
}

// The fewest elements that get a thread of their own: one thread does them in 11 us (0.7 ns each, fp32 in cache, Ice Lake).
constexpr int64_t GRAIN = 16384;

}  // namespace

void masked_adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options, int threads) {
    std::vector<AdamWJob> jobs;
    jobs.reserve(tensors.size());
    int64_t total = 0;
    for (const AdamWTensor& tensor : tensors) {
        AdamWJob job{tensor, options.rounding, {}, 0, total, total += tensor.outer * tensor.count * tensor.inner, {}};
        job.rounding = resolve_rounding(job.tensor, options.rounding);
        if (tensor.index != nullptr && tensor.inner == 1) job.bits = bitmap(tensor);
        const int64_t step = int64_t(*tensor.step += 1);
        job.scalars = adamw_scalars(options, step, job.rounding == Rounding::kahan);
        job.stem = random_stem(options.seed, step, tensor.id);
        if (job.end > job.begin) jobs.push_back(std::move(job));
    }
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, total / GRAIN));
#pragma omp parallel for num_threads(int(shares)) schedule(static)
    for (int64_t i = 0; i < shares; ++i) {
        const int64_t begin = total * i / shares, end = total * (i + 1) / shares;
        for (const AdamWJob& job : jobs) {
            // Shares meet at multiples of 64 elements, so that vectors stay on cache lines.
            const auto cut = [&](int64_t at) {
                return at >= job.end ? job.end - job.begin : std::max<int64_t>(0, at - job.begin) / 64 * 64;
            };
            if (cut(begin) < cut(end)) choose(job.tensor.weight_type, job.rounding)(job, cut(begin), cut(end));
        }
    }
}

}  // namespace ssah
