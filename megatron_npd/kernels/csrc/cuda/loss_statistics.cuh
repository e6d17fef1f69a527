// loss_statistics: a token's softmax in and outside the teacher's top-k ids S, in one read of its logits.
//
// The sum outside S is summed up itself, never the difference of two sums, which would lose all digits where S holds
// nearly all mass. Shared memory holds a bit for each column of the slice, set for columns in S: one byte is read with
// each vector, and is 0 but for k of them.
#pragma once

#include "load.cuh"
#include "reduce.cuh"

namespace npd {

constexpr int kMaxIds = kThreads;  // loss_gradient_ gives an id to a thread

// M = 1 at temperature 1; else M = 2, and scale.k[1] is that of temperature 1.
template <class T, int M>
struct StatisticsArguments {
  Logits<const T> logits;
  const int64_t* targets;  // [rows]
  const int64_t* ids;      // [rows, k]
  const float* p;          // [rows, k]
  int k;
  float inverse_temperature;
  Scale<M> scale;
  float* partials;  // [splits + 1, 1 + M, rows]: max and sums outside S of each split, then those over S
  float* result;    // [3 + M, rows]
};

// Layout of shared memory: sums of the warps, the local columns of S, the bits.
inline size_t statistics_shared_bytes(int k, int columns, int splits, int per_vector, int sums) {
  const size_t vectors = static_cast<size_t>(columns / per_vector + splits - 1) / splits;
  const size_t bits = (vectors * per_vector + 31) / 32 * 4;
  return kWarps * (1 + sums) * sizeof(float) + static_cast<size_t>(k) * sizeof(int) + bits;
}

// Set the bits of the columns in S within the slice. All ids of a byte write the same whole byte, so that it does not
// matter who is last. Ends with a barrier.
template <class T>
NPD_DEVICE void mark_columns(const Slice<T>& slice, const int* columns, int k, unsigned char* bits) {
  const int base = slice.column(slice.begin), size = slice.column(slice.end) - base;
  for (int i = thread(); i < (size + 31) / 32; i += kThreads) reinterpret_cast<uint32_t*>(bits)[i] = 0;
  sync_block();
  for (int i = thread(); i < k; i += kThreads) {
    if (!slice.in_vectors(columns[i])) continue;
    const int at = (columns[i] - base) / 8;
    unsigned byte = 0;
    for (int j = 0; j < k; ++j) {
      const int offset = columns[j] - base - at * 8;
      if (slice.in_vectors(columns[j]) && offset >= 0 && offset < 8) byte |= 1u << offset;
    }
    bits[at] = static_cast<unsigned char>(byte);
  }
  sync_block();
}

// A vector's logits, but -inf for those in S.
template <class T>
NPD_DEVICE void hide_marked(float* z, int offset, const unsigned char* bits) {
  const unsigned marked = bits[offset / 8] >> offset % 8;
  if (!(marked & ((1u << kPerVector<T>) - 1))) return;
  NPD_UNROLL
  for (int e = 0; e < kPerVector<T>; ++e) z[e] = marked >> e & 1 ? -INFINITY : z[e];
}

// What the ids of S on this rank contribute; by the first warp of the first split.
template <class T, int M>
NPD_DEVICE void sum_inside(const StatisticsArguments<T, M>& a, const T* z, const int* columns, int64_t row) {
  Sum<M> inside = empty_sum<M>();
  float pz = 0.f;
  for (int i = lane(); i < a.k; i += kWarp) {
    if (columns[i] < 0) continue;
    const float x = to_float(z[columns[i]]);
    absorb<1>(inside, &x, a.scale);
    pz = fma(a.p[row * a.k + i], mul(x, a.inverse_temperature), pz);
  }
  settle(inside, a.scale);
  inside = merge_warp(inside, a.scale);
  pz = add_warp(pz);
  if (lane() != 0) return;
  float* out = a.partials + splits() * (1 + M) * a.logits.rows + row;
  out[0] = inside.max;
  for (int m = 0; m < M; ++m) out[(1 + m) * a.logits.rows] = inside.sum[m];
  a.result[2 * a.logits.rows + row] = pz;
  const int target = a.logits.column_of(a.targets[row]);
  a.result[3 * a.logits.rows + row] = target < 0 ? 0.f : to_float(z[target]);
}

template <class T>
NPD_DEVICE bool is_in(int column, const int* columns, int k) {
  for (int i = 0; i < k; ++i) {
    if (columns[i] == column) return true;
  }
  return false;
}

// One block for each row and split.
template <class T, int M>
NPD_KERNEL statistics_partials(StatisticsArguments<T, M> a) {
  const int64_t row = block_row();
  const T* z = a.logits.row(row);
  const auto slice = Slice<T>::of(z, a.logits.valid, split(), splits());
  auto* warps = reinterpret_cast<Sum<M>*>(shared_bytes());
  auto* columns = reinterpret_cast<int*>(warps + kWarps);
  auto* bits = reinterpret_cast<unsigned char*>(columns + a.k);
  for (int i = thread(); i < a.k; i += kThreads) columns[i] = a.logits.column_of(a.ids[row * a.k + i]);
  mark_columns(slice, columns, a.k, bits);
  if (warp() == 0 && split() == 0) sum_inside(a, z, columns, row);
  const Scale<M> scale = a.scale;
  Sum<M> s = empty_sum<M>();
  for_each_vector(
      z, slice,
      [&](float* round, int i) {
        NPD_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
          hide_marked<T>(round + u * kPerVector<T>, (i + u * kThreads - slice.begin) * kPerVector<T>, bits);
        }
        absorb<kPerRound<T>>(s, round, scale);
      },
      [&](float* vector, int i) {
        hide_marked<T>(vector, (i - slice.begin) * kPerVector<T>, bits);
        absorb<kPerVector<T>>(s, vector, scale);
      });
  if (thread() < slice.ragged()) {
    const int column = slice.ragged_column(thread());
    const float x = to_float(z[column]);
    if (!is_in<T>(column, columns, a.k)) absorb<1>(s, &x, scale);
  }
  settle(s, scale);
  s = merge_block(s, scale, warps);
  if (thread() != 0) return;
  float* out = a.partials + split() * (1 + M) * a.logits.rows + row;
  out[0] = s.max;
  for (int m = 0; m < M; ++m) out[(1 + m) * a.logits.rows] = s.sum[m];
}

template <int M>
NPD_DEVICE Sum<M> read_partial(const float* partials, int i, int64_t rows, int64_t row) {
  const float* at = partials + i * (1 + M) * rows + row;
  Sum<M> s;
  s.max = at[0];
  for (int m = 0; m < M; ++m) s.sum[m] = at[(1 + m) * rows];
  return s;
}

// Partials of every row to logsumexp: [0] over S, [1] outside it and, at M = 2, [4] over both at temperature 1.
template <int M>
NPD_SMALL_KERNEL statistics_merge(
    const float* partials, int splits, int64_t rows, Scale<M> scale, float inverse_temperature, float* result) {
  const int64_t row = block_row() * block_threads() + thread();
  if (row >= rows) return;
  Sum<M> outside = read_partial<M>(partials, 0, rows, row);
  for (int i = 1; i < splits; ++i) outside = merge(outside, read_partial<M>(partials, i, rows, row), scale);
  const Sum<M> inside = read_partial<M>(partials, splits, rows, row);
  result[row] = fma(inside.max, inverse_temperature, logf(inside.sum[0]));
  result[rows + row] = fma(outside.max, inverse_temperature, logf(outside.sum[0]));
  if constexpr (M == 2) {
    const Sum<M> all = merge(outside, inside, scale);
    result[4 * rows + row] = all.max + logf(all.sum[1]);
  }
}

}  // namespace npd
