// CUDA for the host compiler, as much of it as csrc/cuda needs: its kernels run on the CPU, in
// tests.
//
// Found before the toolkit's header of this name, it lets g++ build the .cu files (-x c++). A grid
// runs block after block. The threads of a block are fibers: each runs until it waits at a barrier,
// and a warp gets as far as it can before the next begins, or, in every other block, the one before
// it. So some warps are as far ahead of others as they might be on a GPU, and a barrier that is
// missing shows. Threads that wait for each other in vain are an error, not a hang.
//
// With CUDA_ON_HOST_REVERSED=1 the last block runs first, and the others take the other warps
// first.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

using std::max, std::min;

using cudaStream_t = void*;
using cudaError_t = const char*;  // the message
constexpr cudaError_t cudaSuccess = nullptr;
inline const char* cudaGetErrorString(cudaError_t error) { return error; }
constexpr cudaError_t cudaErrorInvalidConfiguration = "invalid configuration argument";
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}

struct __attribute__((may_alias)) uint4 {
  unsigned x, y, z, w;
};
inline uint4 __ldg(const uint4* p) {
  uint4 words;  // of another type in memory
  memcpy(&words, p, sizeof(words));
  return words;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline unsigned atomicAdd(unsigned* p, unsigned x) { return std::exchange(*p, *p + x); }
inline void __threadfence() {}

struct Position {
  unsigned x;
};
inline Position threadIdx, blockIdx;

namespace cuda_on_host {

constexpr unsigned kWarp = 32;

// Threads of the host take turns with it: thread_local variables of a shared library are a call
// each, which took a sixth of all time.
class Block {
 public:
  static Block block;  // the only one

  cudaError_t run(unsigned threads, bool reversed, std::function<void()> body) {
    body_ = std::move(body);
    reversed_ = reversed;
    threads_.assign(threads, Thread());
    threadIdx.x = place(0);
    leave(host_);
    return explain();
  }

  // Called by a thread, for all of its group of `size` threads: returns when they are here too.
  void wait(const char* name, int line, unsigned size) {
    const unsigned first = threadIdx.x / size * size;
    const Barrier here = now().barrier = {name, line, first, first + size};
    now().state = State::waiting;
    // Whoever is last in order first: mostly, that one settles it.
    bool complete = true;
    for (unsigned i = 0; complete && i < size; ++i)
      complete = threads_[first + (reversed_ ? i : size - 1 - i)].waits_at(here);
    if (!complete) return leave(*now().fiber);
    for (unsigned i = 0; i < size; ++i) threads_[first + i].state = State::ready;
  }

  // Gives `value` to the other lanes of the warp, for that of lane `lane ^ mask`.
  uint64_t exchange(uint64_t value, unsigned mask, int line) {
    // Every exchange is a barrier, so no lane is two of them ahead: two places are enough.
    const int place = now().exchanges++ % 2;
    now().value[place] = value;
    wait("__shfl_xor_sync", line, kWarp);
    return threads_[threadIdx.x ^ mask].value[place];
  }

  unsigned threads() const { return unsigned(threads_.size()); }

 private:
  enum class State { fresh, ready, waiting, ended };
  struct Barrier {
    const char* name;
    int line;
    unsigned first, last;  // threads that must come

    bool operator==(const Barrier&) const = default;
  };
  // A stack to run on: entered once by its context, then where it was left, without system calls.
  struct Fiber {
    bool entered = false;
    jmp_buf left;
    ucontext_t context;
    std::vector<char> stack;
  };
  struct Thread {
    State state = State::fresh;
    Barrier barrier{};
    Fiber* fiber = nullptr;
    unsigned exchanges = 0;
    uint64_t value[2] = {};

    bool can_run() const { return state == State::fresh || state == State::ready; }
    bool waits_at(const Barrier& b) const { return state == State::waiting && barrier == b; }
  };

  Thread& now() { return threads_[threadIdx.x]; }

  // Leaves a fiber for the next thread that can run, or for run() if there is none.
  void leave(Fiber& from) {
    Fiber* to = &host_;
    if (begin_next()) {
      if (now().state == State::fresh) now().fiber = free_fiber();
      to = now().fiber;
    }
    if (to == &from || _setjmp(from.left)) return;
    if (to == &host_ || std::exchange(to->entered, true)) _longjmp(to->left, 1);
    setcontext(&to->context);
  }

  // The next thread that can run: of the present warp, whose next lane it mostly is, or of the
  // warps from there on and around the block.
  bool begin_next() {
    const unsigned n = threads(), here = place(threadIdx.x), first = here / kWarp * kWarp;
    for (unsigned i = 0; i < n; ++i) {
      const unsigned lane = i < kWarp ? (here + 1 + i) % kWarp : i;
      threadIdx.x = place((first + lane) % n);
      if (now().can_run()) return true;
    }
    return false;
  }
  unsigned place(unsigned t) const { return reversed_ ? threads() - 1 - t : t; }

  // What a fiber does: one thread after another.
  void work() {
    for (;;) {
      body_();
      now().state = State::ended;
      free_.push_back(now().fiber);
      leave(*now().fiber);
    }
  }

  Fiber* free_fiber() {
    if (free_.empty()) {
      Fiber& fiber = *fibers_.emplace_back(std::make_unique<Fiber>());
      fiber.stack.resize(256 << 10);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, [] { block.work(); }, 0);
      free_.push_back(&fiber);
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }

  // When no thread can run: success if all have ended, else who waits for whom.
  cudaError_t explain() {
    const auto text = [this](const Thread& t) {
      const std::string who = "thread " + std::to_string(&t - threads_.data());
      return t.state == State::ended ? who + " has ended"
                                     : who + " waits at " + t.barrier.name + " in line " +
                                           std::to_string(t.barrier.line);
    };
    for (const Thread& t : threads_) {
      if (t.state == State::ended) continue;
      for (unsigned i = t.barrier.first; i < t.barrier.last; ++i) {
        if (threads_[i].waits_at(t.barrier)) continue;
        message_ = text(t) + ", but " + text(threads_[i]);
        free_.clear();  // those fibers will never end
        fibers_.clear();
        return message_.c_str();
      }
    }
    return cudaSuccess;
  }

  std::function<void()> body_;
  bool reversed_ = false;
  std::vector<Thread> threads_;
  Fiber host_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_;
  std::string message_;
};

inline Block Block::block;

}  // namespace cuda_on_host

inline void __syncthreads(int line = __builtin_LINE()) {
  auto& block = cuda_on_host::Block::block;
  block.wait("__syncthreads", line, block.threads());
}
inline void __syncwarp(int line = __builtin_LINE()) {
  cuda_on_host::Block::block.wait("__syncwarp", line, cuda_on_host::kWarp);
}
template <class T>
T __shfl_xor_sync(unsigned members, T value, int mask, int line = __builtin_LINE()) {
  if (members != ~0u) std::abort();  // not imitated
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = cuda_on_host::Block::block.exchange(bits, unsigned(mask), line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

namespace fastvae {

// Stands in for the one in csrc/cuda/kernels.h.
template <class... Params, class... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), unsigned blocks, unsigned threads,
                          cudaStream_t, const Args&... args) {
  static const bool reversed = std::getenv("CUDA_ON_HOST_REVERSED");
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (blocks == 0 || threads % cuda_on_host::kWarp != 0) return cudaErrorInvalidConfiguration;
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = reversed ? blocks - 1 - b : b;
    const auto error =
        cuda_on_host::Block::block.run(threads, (b + reversed) % 2 != 0, [&] { kernel(args...); });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastvae
