// Small kernels, right and wrong ones, that try the emulation itself (tests/test_cuda_on_cpu.py).
#include <pybind11/pybind11.h>

#include "bindings/ptr.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace ssah;

namespace {

constexpr int THREADS = 96;

// Reverses each block's numbers through shared memory.
template <bool BARRIER>
__global__ void reverse(int* data) {
    __shared__ int shared[THREADS];
    int* mine = data + blockIdx.x * THREADS;
    shared[threadIdx.x] = mine[threadIdx.x];
    if (BARRIER) __syncthreads();
    mine[threadIdx.x] = shared[THREADS - 1 - threadIdx.x];
}

// Every lane gets its warp's sum; half of the sum by __shfl_xor, the other by __shfl_down and __shfl.
__global__ void warp_sums(double* data) {
    double sum = data[threadIdx.x];
    for (int flip = 16; flip > 0; flip /= 2) sum += __shfl_xor_sync(0xffffffff, sum, flip);
    double other = data[threadIdx.x];
    for (int by = 16; by > 0; by /= 2) other += __shfl_down_sync(0xffffffff, other, by);
    other = __shfl_sync(0xffffffff, other, 0);
    data[threadIdx.x] = (sum + other) / 2;
}

// Lanes whose number is positive, as bits; two ballots in a row, so that a fast lane runs ahead of a slow one.
__global__ void votes(const int* data, unsigned* first, unsigned* second) {
    const unsigned positive = __ballot_sync(0xffffffff, data[threadIdx.x] > 0);
    const unsigned negative = __ballot_sync(0xffffffff, data[threadIdx.x] < 0);
    first[threadIdx.x] = positive;
    second[threadIdx.x] = negative;
}

// The last block to finish writes what all have added up.
__global__ void count_blocks(unsigned* counter, unsigned* total, unsigned* result) {
    __shared__ bool last;
    atomicAdd(total, threadIdx.x + 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __syncthreads();
    if (last && threadIdx.x == 0) *result = *total;
}

__global__ void half_waits() {
    if (threadIdx.x < 48) __shfl_sync(0xffffffff, 1, 0);
    if (threadIdx.x == 0) __syncthreads();
    if (threadIdx.x == 1) __shfl_sync(0xffffffff, 1, 0);
}

__global__ void half_exchanges() {
    __shfl_sync(0xffff, 1, 0);
}

// Threads may end before a barrier that the others reach.
__global__ void some_leave(int* data) {
    if (threadIdx.x >= 40) return;
    __shared__ int shared[40];
    shared[threadIdx.x] = int(threadIdx.x);
    __syncthreads();
    data[threadIdx.x] = shared[39 - threadIdx.x];
}

}  // namespace

PYBIND11_MODULE(_trials, m) {
    m.def("reverse", [](uintptr_t data, int blocks) { launch(reverse<true>, blocks, THREADS, nullptr, ptr<int>(data)); });
    m.def("reverse_without_barrier", [](uintptr_t data, int blocks) { launch(reverse<false>, blocks, THREADS, nullptr, ptr<int>(data)); });
    m.def("warp_sums", [](uintptr_t data) { launch(warp_sums, 1, THREADS, nullptr, ptr<double>(data)); });
    m.def("votes", [](uintptr_t data, uintptr_t first, uintptr_t second) {
        launch(votes, 1, THREADS, nullptr, ptr<int>(data), ptr<unsigned>(first), ptr<unsigned>(second));
    });
    m.def("count_blocks", [](uintptr_t counter, uintptr_t total, uintptr_t result, int blocks) {
        launch(count_blocks, blocks, THREADS, nullptr, ptr<unsigned>(counter), ptr<unsigned>(total), ptr<unsigned>(result));
    });
    m.def("half_waits", [] { launch(half_waits, 1, THREADS, nullptr); });
    m.def("half_exchanges", [] { launch(half_exchanges, 1, THREADS, nullptr); });
    m.def("some_leave", [](uintptr_t data) { launch(some_leave, 1, THREADS, nullptr, ptr<int>(data)); });
    m.def("too_many_threads", [] { launch(half_waits, 1, 1025, nullptr); });
}
