// What a kernel asks of the machine it runs on: who am I, exchange within a warp, barriers, shared memory. Kernels use
// these names only, so that the host emulation (../emulated_block.h has the same names) runs the very same kernels.
#pragma once

#include "../core.h"

#if defined(__CUDACC__)

// At least two blocks on a multiprocessor: at most 64 registers a thread.
#define NPD_KERNEL __global__ void __launch_bounds__(::npd::kThreads, 2)
#define NPD_SMALL_KERNEL __global__ void __launch_bounds__(256)

namespace npd {

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

NPD_DEVICE unsigned char* shared_bytes() { return dynamic_shared_memory; }
NPD_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
NPD_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
NPD_DEVICE int64_t block_row() { return blockIdx.x; }
NPD_DEVICE int split() { return static_cast<int>(blockIdx.y); }
NPD_DEVICE int splits() { return static_cast<int>(gridDim.y); }
NPD_DEVICE void sync_block() { __syncthreads(); }
NPD_DEVICE bool sync_block_or(bool mine) { return __syncthreads_or(mine); }
NPD_DEVICE void sync_warp() { __syncwarp(); }
NPD_DEVICE uint32_t ballot(bool mine) { return __ballot_sync(~0u, mine); }
template <class V>
NPD_DEVICE V shuffle_xor(V value, int distance) {
  return __shfl_xor_sync(~0u, value, distance);
}

}  // namespace npd

#endif

namespace npd {

NPD_DEVICE int lane() { return thread() % kWarp; }
NPD_DEVICE int warp() { return thread() / kWarp; }

}  // namespace npd
