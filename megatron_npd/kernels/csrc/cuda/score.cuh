// score: what a rank's columns say about a token, in one read of its logits.
#pragma once

#include "load.cuh"
#include "reduce.cuh"

namespace npd {

template <class T>
struct ScoreArguments {
  Logits<const T> logits;
  const int64_t* targets;
  const bool* mask;    // or null
  Scale<1> scale;
  float* partials;     // [2, splits, rows]: max, sum; with one split the first two rows of the result
  float* target_logit; // [rows]
};

inline size_t score_shared_bytes() { return kWarps * sizeof(Sum<1>); }

// One block for each row and split.
template <class T>
NPD_KERNEL score_partials(ScoreArguments<T> a) {
  const int64_t row = block_row(), at = split() * a.logits.rows + row;
  float* max_out = a.partials + at;
  float* sum_out = max_out + splits() * a.logits.rows;
  if (a.mask && !a.mask[row]) {  // no traffic for a token that is not scored
    if (thread() == 0) {
      *max_out = -INFINITY;
      *sum_out = 0.f;
      if (split() == 0) a.target_logit[row] = 0.f;
    }
    return;
  }
  const T* z = a.logits.row(row);
  const auto slice = Slice<T>::of(z, a.logits.valid, split(), splits());
  const Scale<1> scale = a.scale;
  Sum<1> s = empty_sum<1>();
  for_each_vector(
      z, slice, [&](const float* round, int) { absorb<kPerRound<T>>(s, round, scale); },
      [&](const float* vector, int) { absorb<kPerVector<T>>(s, vector, scale); });
  if (thread() < slice.ragged()) {
    const float x = to_float(z[slice.ragged_column(thread())]);
    absorb<1>(s, &x, scale);
  }
  settle(s, scale);
  s = merge_block(s, scale, reinterpret_cast<Sum<1>*>(shared_bytes()));
  if (thread() != 0) return;
  *max_out = s.max;
  *sum_out = s.sum[0];
  if (split() == 0) {
    const int target = a.logits.column_of(a.targets[row]);
    a.target_logit[row] = target < 0 ? 0.f : to_float(z[target]);
  }
}

// Where rows were split: partials [1 + M, splits, rows] to result [1 + M, rows].
template <int M>
NPD_SMALL_KERNEL score_merge(const float* partials, int splits, int64_t rows, Scale<M> scale, float* result) {
  const int64_t row = block_row() * block_threads() + thread();
  if (row >= rows) return;
  Sum<M> all = empty_sum<M>();
  for (int i = 0; i < splits; ++i) {
    const float* at = partials + i * rows + row;
    Sum<M> s;
    s.max = at[0];
    for (int m = 0; m < M; ++m) s.sum[m] = at[(1 + m) * splits * rows];
    all = merge(all, s, scale);
  }
  result[row] = all.max;
  for (int m = 0; m < M; ++m) result[(1 + m) * rows + row] = all.sum[m];
}

}  // namespace npd
