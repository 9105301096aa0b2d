// The parts of CUDA that cam_kernels.cuh needs, on the CPU: include it before that file, and cuda_shim::launch
// runs the kernels. Each thread of a block is a fibre that runs until it has to wait for others, at __syncthreads or a
// shuffle, so that one order of the threads gives one result; a different order gives a different one if a
// __syncthreads is missing. Blocks run one after the other. Shared memory starts as NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace cuda_shim {

struct Index {
    unsigned x;
};

constexpr std::size_t most_shared_bytes = 48 * 1024;
constexpr std::size_t stack_bytes = 64 * 1024;
constexpr unsigned warp_size = 32;

// Order of the threads between two waits.
enum class Order { ascending = 0, descending = 1, shuffled = 2 };

}  // namespace cuda_shim

inline cuda_shim::Index threadIdx;
inline cuda_shim::Index blockIdx;
inline cuda_shim::Index blockDim;
inline uint4 shared_memory[cuda_shim::most_shared_bytes / sizeof(uint4)];

namespace cuda_shim {

enum class State { ready, at_barrier, at_shuffle, done };

struct Fibre {
    ucontext_t context;
    std::vector<std::byte> stack = std::vector<std::byte>(stack_bytes);
    State state;
    std::uint32_t exchanged[2];  // alternating: a lane may be at its next shuffle before others have read this one
    unsigned turn;
};

using Kernel = void (*)(const void* arguments);

// One block: its threads as fibres, which are reused for the next one.
class Block {
public:
    void run(Kernel kernel, const void* arguments, unsigned threads, Order order) {
        kernel_ = kernel;
        arguments_ = arguments;
        if (fibres_.size() < threads) fibres_.resize(threads);
        turns_.resize(threads);
        std::iota(turns_.begin(), turns_.end(), 0u);
        if (order == Order::descending) std::reverse(turns_.begin(), turns_.end());
        if (order == Order::shuffled) std::shuffle(turns_.begin(), turns_.end(), std::mt19937(blockIdx.x));
        for (unsigned t = 0; t < threads; ++t) start(fibres_[t]);
        while (true) {
            for (const unsigned t : turns_) {
                if (fibres_[t].state == State::ready) resume(t);
            }
            if (all(0, threads, State::done)) return;
            const bool shuffled = release_warps(threads);
            if (shuffled) continue;
            if (!all(0, threads, State::at_barrier)) {
                throw std::logic_error("threads wait for others that are gone or wait elsewhere");
            }
            release(0, threads);
        }
    }

    void wait(State state) {
        fibres_[current_].state = state;
        leave(fibres_[current_], false);
    }

    std::uint32_t exchange(std::uint32_t bits, unsigned offset) {
        const unsigned self = current_;
        const unsigned turn = fibres_[self].turn++ % 2;
        fibres_[self].exchanged[turn] = bits;
        wait(State::at_shuffle);
        return fibres_[self / warp_size * warp_size + (self % warp_size ^ offset)].exchanged[turn];
    }

private:
    static void enter();

    void start(Fibre& fibre) {
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data();
        fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link = nullptr;
        fibre.state = State::ready;
        fibre.turn = 0;
        makecontext(&fibre.context, &Block::enter, 0);
    }

    void resume(unsigned t) {
        current_ = t;
        threadIdx.x = t;
#if defined(__SANITIZE_ADDRESS__)
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(&fake_stack, fibres_[t].stack.data(), stack_bytes);
#endif
        swapcontext(&scheduler_, &fibres_[t].context);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    }

    void leave(Fibre& fibre, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
        static_cast<void>(for_good);
        swapcontext(&fibre.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    }

    bool all(unsigned first, unsigned count, State state) const {
        return std::all_of(fibres_.begin() + first, fibres_.begin() + first + count,
                           [&](const Fibre& fibre) { return fibre.state == state; });
    }

    void release(unsigned first, unsigned count) {
        for (unsigned t = first; t < first + count; ++t) fibres_[t].state = State::ready;
    }

    bool release_warps(unsigned threads) {
        bool any = false;
        for (unsigned first = 0; first < threads; first += warp_size) {
            if (!all(first, warp_size, State::at_shuffle)) continue;
            release(first, warp_size);
            any = true;
        }
        return any;
    }

    Kernel kernel_ = nullptr;
    const void* arguments_ = nullptr;
    std::vector<Fibre> fibres_;
    std::vector<unsigned> turns_;
    unsigned current_ = 0;
    ucontext_t scheduler_;
    const void* scheduler_stack_ = nullptr;
    std::size_t scheduler_stack_bytes_ = 0;
};

inline Block& block() {
    static Block one;
    return one;
}

inline void Block::enter() {
    Block& self = block();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_stack_bytes_);
#endif
    self.kernel_(self.arguments_);
    Fibre& fibre = self.fibres_[self.current_];
    fibre.state = State::done;
    self.leave(fibre, true);
}

// Throws std::invalid_argument for what a device would reject, std::logic_error for threads that wait forever.
inline void launch(Kernel kernel, const void* arguments, unsigned blocks, unsigned threads, std::size_t shared_bytes,
                   Order order) {
    if (blocks == 0 || threads == 0 || threads > 1024 || threads % warp_size != 0) {
        throw std::invalid_argument("no launch of " + std::to_string(blocks) + " x " + std::to_string(threads));
    }
    if (shared_bytes > most_shared_bytes) {
        throw std::invalid_argument(std::to_string(shared_bytes) + " bytes of shared memory");
    }
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        std::memset(shared_memory, 0xff, sizeof shared_memory);
#if defined(__SANITIZE_ADDRESS__)
        auto* const unused = reinterpret_cast<std::byte*>(shared_memory) + shared_bytes;
        __asan_poison_memory_region(unused, most_shared_bytes - shared_bytes);
#endif
        block().run(kernel, arguments, threads, order);
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(shared_memory, sizeof shared_memory);
#endif
    }
}

}  // namespace cuda_shim

template <class T>
inline T __ldg(const T* source) {
    return *source;
}

inline void __syncthreads() { cuda_shim::block().wait(cuda_shim::State::at_barrier); }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float __shfl_xor_sync(unsigned lanes, float value, int offset) {
    if (lanes != 0xffffffffu) throw std::logic_error("a shuffle of a part of a warp");
    return __uint_as_float(cuda_shim::block().exchange(__float_as_uint(value), static_cast<unsigned>(offset)));
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
inline int __double2int_rn(double value) { return static_cast<int>(std::nearbyint(value)); }
