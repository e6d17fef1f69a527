// Deterministic reductions: a butterfly within a warp, then over the warps of a block. Merging is symmetric up to
// rounding and the order is fixed, so the result is the same bits every time.
#pragma once

#include "lane.cuh"

namespace npd {

template <int M>
NPD_DEVICE Sum<M> from_lane(const Sum<M>& mine, int distance) {
  Sum<M> other;
  other.max = shuffle_xor(mine.max, distance);
  NPD_UNROLL
  for (int m = 0; m < M; ++m) other.sum[m] = shuffle_xor(mine.sum[m], distance);
  return other;
}

// Settled sums of a warp's lanes, merged; lane 0 has the result that counts.
template <int M>
NPD_DEVICE Sum<M> merge_warp(Sum<M> s, const Scale<M>& scale) {
  NPD_UNROLL
  for (int distance = kWarp / 2; distance; distance /= 2) s = merge(s, from_lane(s, distance), scale);
  return s;
}

// Settled sums of a block's threads, merged; thread 0 has the result. `warps` is shared memory.
template <int M>
NPD_DEVICE Sum<M> merge_block(Sum<M> s, const Scale<M>& scale, Sum<M>* warps) {
  s = merge_warp(s, scale);
  if (lane() == 0) warps[warp()] = s;
  sync_block();
  if (warp() != 0) return s;
  s = lane() < kWarps ? warps[lane()] : empty_sum<M>();
  return merge_warp(s, scale);
}

template <class V>
NPD_DEVICE V add_warp(V x) {
  NPD_UNROLL
  for (int distance = kWarp / 2; distance; distance /= 2) x += shuffle_xor(x, distance);
  return x;
}

}  // namespace npd
