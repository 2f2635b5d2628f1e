// Prints a hash of what the moment kernels, masked_adamw and perturb compute on fixed data, so that builds by different compilers and
// for different instruction sets can be compared bit for bit. Built and run by portability.sh.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/masked_adamw.h"
#include "cpu/moments.h"
#include "cpu/perturb.h"

using namespace ssah;

// FNV-1a.
static unsigned long long hash(const void* data, size_t bytes) {
    unsigned long long h = 1469598103934665603ull;
    for (size_t i = 0; i < bytes; ++i) h = (h ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211ull;
    return h;
}

// Three steps on rows, columns and a whole weight at once; x holds the weights, y the gradients.
static void print_adamw(DType dtype, Rounding rounding, const char* x, const char* y, int64_t rows, int64_t columns) {
    const int64_t size = dtype == DType::f32 ? 4 : 2, count = rows * columns;
    std::vector<int64_t> every_third;
    for (int64_t i = 0; i < rows; i += 3) every_third.push_back(i);
    const int64_t third = int64_t(every_third.size());
    std::vector<char> weights(3 * count * size), extras(3 * count * 4);
    std::vector<float> m(3 * count), v(3 * count), v_max(3 * count), steps(3);
    std::vector<AdamWTensor> tensors(3);
    for (int i = 0; i < 3; ++i) {
        std::memcpy(&weights[i * count * size], x, count * size);
        AdamWTensor& t = tensors[i];
        t.weight = &weights[i * count * size], t.grad = y, t.m = &m[i * count], t.v = &v[i * count], t.v_max = &v_max[i * count];
        t.extra = &extras[i * count * 4], t.step = &steps[i], t.index = i == 2 ? nullptr : every_third.data();
        t.outer = i == 1 ? rows : 1, t.size = i == 0 ? rows : i == 1 ? columns : 1, t.count = i == 2 ? 1 : third;
        t.inner = i == 0 ? columns : i == 1 ? 1 : count;
        t.weight_type = t.grad_type = t.copy_type = dtype, t.id = i, t.offset = (uint64_t(1) << 32) - 77;
    }
    for (int step = 0; step < 3; ++step) masked_adamw(tensors, {1e-2, 0.9, 0.99, 1e-8, 0.1, rounding, 7, -3.0}, 2);
    std::printf("%d adamw %d %016llx %016llx %016llx %016llx\n", int(dtype), int(rounding), hash(weights.data(), weights.size()),
                hash(extras.data(), extras.size()), hash(m.data(), m.size() * 4), hash(v_max.data(), v_max.size() * 4));
}

// Two directions across a change of keys, and their scales.
static void print_perturb(DType dtype, const char* x, int64_t count) {
    const std::vector<uint64_t> seeds{1, ~uint64_t(0)};
    const DirectionKey key{7, (uint64_t(1) << 33) - 5001};
    std::vector<char> out(count * (dtype == DType::f32 ? 4 : 2));
    perturb(dtype, out.data(), x, count, seeds, {0.3, -2.0}, key, 2);
    const std::vector<double> scales = direction_scales(dtype, x, count, seeds, key, 2);
    std::printf("%d perturb %016llx %016llx\n", int(dtype), hash(out.data(), out.size()), hash(scales.data(), 16));
}

int main() {
    const int64_t rows = 77, channels = 133, groups = 2;
    uint32_t seed = 1;
    std::vector<float> wide(2 * rows * channels);
    for (float& value : wide) {
        seed = seed * 1664525u + 1013904223u;
        value = ((seed >> 8) / 8388608.0f - 1) * 4;
    }
    std::vector<uint16_t> narrow(wide.size());
    for (size_t i = 0; i < wide.size(); ++i) std::memcpy(&narrow[i], reinterpret_cast<const char*>(&wide[i]) + 2, 2);
    std::vector<int8_t> group(rows);
    for (int64_t i = 0; i < rows; ++i) group[i] = int8_t(i / 19 % 3 - 1);

    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        const size_t size = dtype == DType::f32 ? 4 : 2;
        const char* x = dtype == DType::f32 ? reinterpret_cast<char*>(wide.data()) : reinterpret_cast<char*>(narrow.data());
        const char* y = x + rows * channels * size;
        for (int activation = -1; activation < 4; ++activation) {
            std::vector<int64_t> count(groups);
            std::vector<double> mean(groups * channels), m2(groups * channels);
            std::vector<char> h(rows * channels * size);
            const MomentState state{count.data(), mean.data(), m2.data()};
            if (activation < 0) {
                channel_moments(dtype, x, channels, group.data(), rows, channels, state, 2);
            } else {
                gated_moments(dtype, Activation(activation), x, channels, y, channels, h.data(), channels, group.data(), rows, channels,
                              state, 2);
            }
            std::printf("%d %d %016llx %016llx %016llx\n", int(dtype), activation, hash(h.data(), h.size()),
                        hash(mean.data(), mean.size() * 8), hash(m2.data(), m2.size() * 8));
        }
        for (Rounding rounding : {Rounding::stochastic, Rounding::kahan, Rounding::master, Rounding::nearest}) {
            print_adamw(dtype, rounding, x, y, rows, channels);
        }
        print_perturb(dtype, x, rows * channels);
    }
    std::fprintf(stderr, "%s\n", isa_name(active_isa()));
}
