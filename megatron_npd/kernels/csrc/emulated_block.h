// A block of CUDA threads on the host, for the emulation: the names of cuda/lane.cuh and cuda/load.cuh, where every
// thread is a fiber that runs up to its next exchange with the others. It holds what a GPU would only sometimes show:
//
//   - shared memory starts as NaN bytes for every block;
//   - threads run in ascending or in descending order between two barriers, so that results of both runs differ
//     where a barrier is missing;
//   - a warp exchange or a barrier that not all its threads reach, or a block that ends with some waiting, aborts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "core.h"

#define NPD_KERNEL inline void
#define NPD_SMALL_KERNEL inline void

namespace npd {

enum class Waits { kNothing, kWarp, kBlock, kEnd };

struct Fiber {
  ucontext_t start;
  jmp_buf here;  // once started: swapcontext would ask the kernel for the signal mask every time
  bool started;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  Waits waits;
  uint32_t exchanges;      // of the warp so far: two buffers in turn, as the next may start before all have read this
  uint64_t sent[2];
};

struct EmulatedBlock {
  std::vector<Fiber> fibers = std::vector<Fiber>(kThreads);
  jmp_buf scheduler;
  alignas(16) unsigned char shared[64 * 1024];
  std::function<void()> kernel;
  int threads, thread, split, splits;
  int64_t row;
  bool descending;
};

inline EmulatedBlock block;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated block: %s (row %lld, thread %d)\n", what, static_cast<long long>(block.row),
               block.thread);
  std::abort();
}

__attribute__((noinline)) inline void wait(Waits what) {
  Fiber& me = block.fibers[block.thread];
  me.waits = what;
  if (_setjmp(me.here) == 0) _longjmp(block.scheduler, 1);
}

inline void run_fiber() {
  block.kernel();
  wait(Waits::kEnd);
}

__attribute__((noinline)) inline void resume(int thread) {
  Fiber& fiber = block.fibers[thread];
  block.thread = thread;
  fiber.waits = Waits::kNothing;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Run a warp until all its lanes wait for the block or have ended.
inline Waits run_warp(int first) {
  for (;;) {
    for (int i = 0; i < kWarp; ++i) resume(first + (block.descending ? kWarp - 1 - i : i));
    const Waits waits = block.fibers[first].waits;
    for (int i = 1; i < kWarp; ++i) {
      if (block.fibers[first + i].waits != waits) fail("the lanes of a warp wait for different things");
    }
    if (waits != Waits::kWarp) return waits;
  }
}

inline void start_fibers() {
  for (int t = 0; t < block.threads; ++t) {
    Fiber& fiber = block.fibers[t];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.started = false;
    fiber.exchanges = 0;
    makecontext(&fiber.start, run_fiber, 0);
  }
}

inline void run_block() {
  std::memset(block.shared, 0xff, sizeof block.shared);
  start_fibers();
  const int warps = block.threads / kWarp;
  for (;;) {
    Waits waits = Waits::kNothing;
    for (int i = 0; i < warps; ++i) {
      const Waits its = run_warp((block.descending ? warps - 1 - i : i) * kWarp);
      if (i > 0 && its != waits) fail("a warp ended where another waits for the block");
      waits = its;
    }
    if (waits == Waits::kEnd) return;
  }
}

// Every block of a grid, one after the other.
inline void launch(int64_t rows, int splits, int threads, bool descending, std::function<void()> kernel) {
  block.kernel = std::move(kernel);
  block.threads = threads;
  block.descending = descending;
  block.splits = splits;
  for (block.row = 0; block.row < rows; ++block.row) {
    for (block.split = 0; block.split < splits; ++block.split) run_block();
  }
}

// ---- The names of cuda/lane.cuh -----------------------------------------------------------------------------------

inline unsigned char* shared_bytes() { return block.shared; }
inline int thread() { return block.thread; }
inline int block_threads() { return block.threads; }
inline int64_t block_row() { return block.row; }
inline int split() { return block.split; }
inline int splits() { return block.splits; }
inline void sync_block() { wait(Waits::kBlock); }
inline void sync_warp() { wait(Waits::kWarp); }

// Every lane's `value`; in the slot of this exchange until the warp's next but one.
template <class V>
inline int send_to_warp(V value) {
  Fiber& me = block.fibers[block.thread];
  const int slot = me.exchanges++ & 1;
  std::memcpy(&me.sent[slot], &value, sizeof value);
  wait(Waits::kWarp);
  return slot;
}

template <class V>
inline V shuffle_xor(V value, int distance) {
  const int slot = send_to_warp(value);
  V other;
  std::memcpy(&other, &block.fibers[block.thread ^ distance].sent[slot], sizeof other);
  return other;
}

inline uint32_t ballot(bool mine) {
  const int slot = send_to_warp(static_cast<uint64_t>(mine));
  uint32_t votes = 0;
  const int first = block.thread / kWarp * kWarp;
  for (int i = 0; i < kWarp; ++i) votes |= static_cast<uint32_t>(block.fibers[first + i].sent[slot] != 0) << i;
  return votes;
}

inline bool sync_block_or(bool mine) {
  block.fibers[block.thread].sent[0] = mine;
  wait(Waits::kBlock);
  bool any = false;
  for (int t = 0; t < block.threads; ++t) any |= block.fibers[t].sent[0] != 0;
  wait(Waits::kBlock);
  return any;
}

// ---- The names of cuda/load.cuh ------------------------------------------------------------------------------------

inline Vector load_streaming(const Vector* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("a vector load is not aligned");
  return *p;
}
inline Vector load_before_store(const Vector* p) { return load_streaming(p); }
inline void store_vector(Vector* p, const Vector& v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("a vector store is not aligned");
  *p = v;
}

}  // namespace npd
