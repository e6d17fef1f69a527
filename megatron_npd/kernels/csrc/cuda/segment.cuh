// segment_sum: sums of packed sequences in float64, in an order that is always the same.
#pragma once

#include "reduce.cuh"

namespace npd {

constexpr int kSegmentThreads = 256;

inline size_t segment_shared_bytes() { return kSegmentThreads / kWarp * sizeof(double); }

// values [tokens], cu_seqlens [segments + 1], mask [tokens] or null -> result [segments]. One block for each segment.
template <class Value>
NPD_SMALL_KERNEL segment_sums(
    const Value* values, const int32_t* cu_seqlens, const bool* mask, int64_t tokens, double* result) {
  auto* warps = reinterpret_cast<double*>(shared_bytes());
  const int64_t segment = block_row(), begin = cu_seqlens[segment], stated = cu_seqlens[segment + 1];
  const int64_t end = stated < tokens ? stated : tokens;  // never read past the values, whatever was stated
  double sum = 0;
  for (int64_t i = (begin > 0 ? begin : 0) + thread(); i < end; i += kSegmentThreads) {
    if (!mask || mask[i]) sum += values[i];
  }
  sum = add_warp(sum);
  if (lane() == 0) warps[warp()] = sum;
  sync_block();
  if (thread() != 0) return;
  for (int w = 1; w < kSegmentThreads / kWarp; ++w) sum += warps[w];
  result[segment] = sum;
}

}  // namespace npd
