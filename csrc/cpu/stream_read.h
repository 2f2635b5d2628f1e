// Reads a buffer as fast as the machine can: the ceiling that benchmarks set beside a kernel's bandwidth.
#pragma once

#include <cstdint>

namespace ssah {

// XOR of all 8-byte words of [data, data + bytes), bytes a multiple of 64.
uint64_t stream_read(const void* data, int64_t bytes, int threads);

}  // namespace ssah
