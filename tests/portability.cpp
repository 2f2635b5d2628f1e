// Prints a hash of what the moment kernels compute on fixed data, so that builds by different compilers and for different
// instruction sets can be compared bit for bit. Built and run by portability.sh.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/moments.h"

using namespace ssah;

// FNV-1a.
static unsigned long long hash(const void* data, size_t bytes) {
    unsigned long long h = 1469598103934665603ull;
    for (size_t i = 0; i < bytes; ++i) h = (h ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211ull;
    return h;
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
    }
    std::fprintf(stderr, "%s\n", isa_name(active_isa()));
}
