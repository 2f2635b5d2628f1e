// Keys of random numbers that depend on nothing but what they are for and where they are: splitmix64 (Steele, Lea & Flood 2014).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ssah {

SSAH_HD inline uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

// The part of the key that a whole tensor shares; random_key adds the upper half of the position.
SSAH_HD inline uint64_t random_stem(uint64_t seed, uint64_t step, uint64_t id) {
    return splitmix64(splitmix64(splitmix64(seed) ^ step) ^ id);
}
SSAH_HD inline uint64_t random_key(uint64_t stem, uint64_t position) {
    return splitmix64(stem ^ position >> 32);
}

}  // namespace ssah
