// How every kernel is started. Plain C++, so that the same files compile against tests/cuda_on_cpu.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace ssah {

inline void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Arguments are converted to the kernel's own types. Throws std::runtime_error where the launch fails; nothing waits for the kernel.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments&&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace ssah
