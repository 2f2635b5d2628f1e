// The little of CUDA that csrc/cuda/ uses, on the CPU: the same sources compiled by the host's compiler, for tests without a GPU.
//
// A block's threads are fibers. Each runs until it waits for others (a barrier, a warp's exchange), then another one, drawn at random,
// goes on; so do the blocks of a grid, one after the other. What a kernel leaves to chance (a missing barrier, an exchange in only one
// branch) therefore gives wrong numbers or an error here. A kernel has ended when its launch returns.
//
// Not emulated: dynamic shared memory, streams, part of a warp exchanging, and the memory model between blocks that run at once.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// ---- the language

#define CUDA_ON_CPU
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static  // one block at a time
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
    unsigned x, y;
} __attribute__((aligned(8)));
struct uint3 {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct float2 {
    float x, y;
} __attribute__((aligned(8)));
struct float4 {
    float x, y, z, w;
} __attribute__((aligned(16)));
struct double2 {
    double x, y;
} __attribute__((aligned(16)));
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;  // of the fiber that runs
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

// ---- the runtime

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int major, minor, multiProcessorCount, l2CacheSize;
};
#define CUDART_VERSION 0

inline const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (device != 0) return cudaErrorInvalidValue;
    *p = {"CUDA on the CPU", size_t(1) << 30, 9, 0, 1, 1 << 20};
    return cudaSuccess;
}

// ---- fibers

namespace cuda_on_cpu {

constexpr size_t STACK = 256 << 10;  // a kernel's parameters, up to 32 KB, are copied there

// Threads that wait for each other.
struct Meeting {
    int alive = 0, arrived = 0;
    std::vector<int> waiting;
};

struct Fiber {
    void* stack;
    ucontext_t start;
    jmp_buf here;
    bool started = false;
    uint3 thread;
    int exchange = 0;  // which of the warp's two boards is next
};

// A fast lane can be one exchange ahead of a slow one, never two: the next needs them all.
struct Warp {
    Meeting meeting;
    uint64_t board[2][warpSize] = {};
};

class Machine {
  public:
    void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel) {
        const std::lock_guard<std::mutex> one_at_a_time(mutex_);
        gridDim = grid, blockDim = block, kernel_ = &kernel;
        std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), random_);
        for (const uint64_t i : order) {
            blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
            run_block(block.x * block.y * block.z);
        }
    }

    void synchronize() { wait(block_); }

    // What each lane of the warp hands in.
    const uint64_t* exchange(unsigned mask, uint64_t value) {
        if (mask != 0xffffffff) fail("an exchange of part of a warp is not emulated");
        Warp& warp = warps_[current_ / warpSize];
        uint64_t* board = warp.board[fibers_[current_]->exchange ^= 1];
        board[lane()] = value;
        wait(warp.meeting);
        return board;
    }
    unsigned lanes() const { return unsigned(std::min(threads_ - current_ / warpSize * warpSize, warpSize)); }
    int lane() const { return current_ % warpSize; }

  private:
    void run_block(int threads) {
        threads_ = threads;
        warps_.assign((threads + warpSize - 1) / warpSize, {});
        block_ = {};
        ready_.resize(threads);
        std::iota(ready_.begin(), ready_.end(), 0);
        for (int i = 0; i < threads; ++i) {
            if (i == int(fibers_.size())) fibers_.push_back(std::make_unique<Fiber>(new_fiber()));
            const unsigned u = unsigned(i);
            fibers_[i]->thread = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
            fibers_[i]->exchange = 0;
            ++block_.alive;
            ++warps_[i / warpSize].meeting.alive;
        }
        while (!ready_.empty() && error_.empty()) {
            std::swap(ready_[random_() % ready_.size()], ready_.back());
            current_ = ready_.back();
            ready_.pop_back();
            resume(*fibers_[current_]);
        }
        if (block_.alive > 0 && error_.empty()) error_ = "some threads of a block wait for others that never come";
        if (error_.empty()) return;
        fibers_.clear();  // stuck in the middle of a kernel; their stacks are lost
        throw std::runtime_error("CUDA on the CPU: " + std::exchange(error_, {}));
    }

    Fiber new_fiber() {
        Fiber fiber{};
        fiber.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (fiber.stack == MAP_FAILED) throw std::runtime_error("CUDA on the CPU: no memory for a thread's stack");
        return fiber;
    }

    // swapcontext asks the kernel for the signal mask each time; longjmp does not, and is used wherever the fiber has run before.
    void resume(Fiber& fiber) {
        threadIdx = fiber.thread;
        if (_setjmp(scheduler_) != 0) return;
        if (fiber.started) _longjmp(fiber.here, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack;
        fiber.start.uc_stack.ss_size = STACK;
        makecontext(&fiber.start, &Machine::enter, 0);
        setcontext(&fiber.start);
    }

    // A fiber outlives the block: it runs one kernel after the other.
    static void enter() { machine().live(); }
    [[noreturn]] void live() {
        for (;;) {
            (*kernel_)();
            leave(block_);
            leave(warps_[current_ / warpSize].meeting);
            yield();
        }
    }

    void yield() {
        if (_setjmp(fibers_[current_]->here) == 0) _longjmp(scheduler_, 1);
    }

    void wait(Meeting& meeting) {
        meeting.waiting.push_back(current_);
        if (++meeting.arrived == meeting.alive) release(meeting);
        yield();
    }
    void leave(Meeting& meeting) {
        if (--meeting.alive > 0 && meeting.arrived == meeting.alive) release(meeting);
    }
    void release(Meeting& meeting) {
        ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
        meeting.waiting.clear();
        meeting.arrived = 0;
    }

    // Ends the launch from inside a fiber, where nothing could catch an exception.
    void fail(const char* error) {
        error_ = error;
        yield();
    }

  public:
    static Machine& machine() {
        static Machine* const machine = new Machine;  // outlives everything
        return *machine;
    }

  private:
    std::mutex mutex_;
    std::mt19937 random_{0};
    const std::function<void()>* kernel_ = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Warp> warps_;
    Meeting block_;
    std::vector<int> ready_;
    std::string error_;
    jmp_buf scheduler_;
    int current_ = 0, threads_ = 0;
};

template <class T>
uint64_t pack(T value) {
    static_assert(sizeof(T) <= 8, "an exchange moves up to 8 bytes");
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(value));
    return word;
}
template <class T>
T unpack(uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
}

inline Machine& machine() {
    return Machine::machine();
}

}  // namespace cuda_on_cpu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    const dim3 grid = config->gridDim, block = config->blockDim;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535 || threads == 0 ||
        threads > 1024 || config->dynamicSmemBytes != 0) {
        return cudaErrorInvalidConfiguration;
    }
    const std::tuple<std::decay_t<Parameters>...> parameters(std::forward<Arguments>(arguments)...);
    cuda_on_cpu::machine().run_grid(grid, block, [&] { std::apply(kernel, parameters); });
    return cudaSuccess;
}

// ---- what kernels call

inline void __syncthreads() {
    cuda_on_cpu::machine().synchronize();
}
inline void __syncwarp(unsigned mask = 0xffffffff) {
    cuda_on_cpu::machine().exchange(mask, 0);
}
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return cuda_on_cpu::unpack<T>(cuda_on_cpu::machine().exchange(mask, cuda_on_cpu::pack(value))[lane & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
    return __shfl_sync(mask, value, cuda_on_cpu::machine().lane() ^ flip);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = cuda_on_cpu::machine().lane();
    return __shfl_sync(mask, value, lane + by < 32 ? lane + by : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = cuda_on_cpu::machine().lane();
    return __shfl_sync(mask, value, lane >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t* board = cuda_on_cpu::machine().exchange(mask, predicate != 0);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < cuda_on_cpu::machine().lanes(); ++lane) votes |= unsigned(board[lane]) << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}

// One fiber runs at a time, so any read, change and write is atomic.
template <class T>
T atomicAdd(T* p, std::common_type_t<T> by) {
    return std::exchange(*p, T(*p + by));
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> other) {
    return std::exchange(*p, std::max(*p, other));
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> value) {
    return std::exchange(*p, value);
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
    return *p == expected ? std::exchange(*p, value) : *p;
}

template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T value) {
    *p = value;
}

inline float __int_as_float(int i) {
    return cuda_on_cpu::unpack<float>(unsigned(i));
}
inline unsigned __float_as_uint(float f) {
    return unsigned(cuda_on_cpu::pack(f));
}
inline float __uint_as_float(unsigned u) {
    return cuda_on_cpu::unpack<float>(u);
}
inline int __popc(unsigned u) {
    return __builtin_popcount(u);
}
inline int __ffs(int i) {
    return __builtin_ffs(i);
}
inline int __clz(int i) {
    return i == 0 ? 32 : __builtin_clz(unsigned(i));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned(uint64_t(a) * b >> 32);
}
