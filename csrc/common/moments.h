// Running moments of channels, and what a gated MLP's activation can be.
#pragma once

#include <cstdint>

namespace ssah {

// State of all groups: count [G], mean and m2 [G, channels], updated in place.
struct MomentState {
    int64_t* count;
    double* mean;
    double* m2;
};

enum class Activation : int { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3 };

}  // namespace ssah
