#include "cpu/stream_read.h"

#include "cpu/isa.h"

#define SSAH_KERNEL_FILE "cpu/stream_read.inl"
#include "cpu/for_each_isa.h"

namespace ssah {

uint64_t stream_read(const void* data, int64_t bytes, int threads) {
    auto read_share = baseline::stream_read_share;
#if defined(__x86_64__)
    if (active_isa() == Isa::avx2) read_share = avx2::stream_read_share;
    if (active_isa() == Isa::avx512) read_share = avx512::stream_read_share;
#endif
    const char* start = static_cast<const char*>(data);
    const int64_t blocks = bytes / 64;
    uint64_t word = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : word) schedule(static)
    for (int i = 0; i < threads; ++i) {
        const int64_t begin = blocks * i / threads * 64, end = blocks * (i + 1) / threads * 64;
        word ^= read_share(start + begin, end - begin);
    }
    return word;
}

}  // namespace ssah
