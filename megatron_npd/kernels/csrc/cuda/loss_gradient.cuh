// loss_gradient_: logits overwritten by the gradient of the loss, in one read and one write.
//
// Every column gets the formula of a column outside S first. The few columns of S and the target are read before that,
// computed in float32 from the original logits and written after it: adding to an already rounded entry instead errs by
// 1.6e-2 in bfloat16.
#pragma once

#include "load.cuh"

namespace npd {

// Order of the coefficients, float32 [8, rows]. The same as in kernels/objective.py and cpu/loss.h.
enum Coefficient { kTailFactor, kLseTail, kCe, kLseOne, kStudent, kNormaliser, kTeacher, kTarget, kCoefficients };

// M = 1 at temperature 1, where the CE's softmax is part of the tail factor; else 2.
template <class T, int M>
struct GradientArguments {
  Logits<T> logits;
  const int64_t* targets;     // [rows]
  const int64_t* ids;         // [rows, k]
  const float* p;             // [rows, k]
  const float* coefficients;  // [8, rows]
  int k;
  float scale;  // log2(e) / temperature
};

// factor * exp(z / temperature - lse), with one fma and one exponential for each z.
struct Softmax {
  float factor, k, shift;

  NPD_DEVICE static Softmax of(float factor, float k, float lse) {
    // Nothing times exp(inf) would be NaN where lse is -inf; exp2(-inf) is not.
    if (factor == 0.f) return {0.f, k, INFINITY};
    const float shift = mul(lse, kLog2e), rounding = -fma(lse, kLog2e, -shift);
    return {fabsf(shift) < INFINITY ? mul(factor, exp2_fast(rounding)) : factor, k, shift};
  }
  NPD_DEVICE float at(float z) const { return mul(factor, exp2_fast(fma(z, k, -shift))); }
};

template <int M>
struct RowGradient {
  Softmax tail, ce, student;
  float teacher, target;

  template <class T>
  NPD_DEVICE static RowGradient of(const GradientArguments<T, M>& a, int64_t row) {
    float c[kCoefficients];
    NPD_UNROLL
    for (int i = 0; i < kCoefficients; ++i) c[i] = a.coefficients[i * a.logits.rows + row];
    return {Softmax::of(c[kTailFactor], a.scale, c[kLseTail]), Softmax::of(c[kCe], kLog2e, c[kLseOne]),
            Softmax::of(c[kStudent], a.scale, c[kNormaliser]), c[kTeacher], c[kTarget]};
  }
  NPD_DEVICE float outside(float z) const { return M == 1 ? tail.at(z) : tail.at(z) + ce.at(z); }
  NPD_DEVICE float inside(float z, float p) const { return fma(-teacher, p, student.at(z)) + ce.at(z); }
};

// An entry of S or the target that this block will write last.
struct Entry {
  int column;  // -1: none
  float value;
};

// The i-th id of S, if it lies in the slice.
template <class T, int M>
NPD_DEVICE Entry entry_of_id(const GradientArguments<T, M>& a, const Slice<T>& slice, int64_t row, int i) {
  const int64_t id = a.ids[row * a.k + i];
  const int column = a.logits.column_of(id);
  if (!slice.holds(column)) return {-1, 0.f};
  const auto gradient = RowGradient<M>::of(a, row);
  const float value = gradient.inside(to_float(a.logits.row(row)[column]), a.p[row * a.k + i]);
  return {column, id == a.targets[row] ? value - gradient.target : value};
}

// The target, if it lies in the slice; for a target outside S.
template <class T, int M>
NPD_DEVICE Entry entry_of_target(const GradientArguments<T, M>& a, const Slice<T>& slice, int64_t row) {
  const int column = a.logits.column_of(a.targets[row]);
  if (!slice.holds(column)) return {-1, 0.f};
  const auto gradient = RowGradient<M>::of(a, row);
  return {column, gradient.outside(to_float(a.logits.row(row)[column])) - gradient.target};
}

template <class T, int M>
NPD_DEVICE void overwrite_vector(Vector* at, const Vector& v, const RowGradient<M>& gradient) {
  float z[kPerVector<T>];
  unpack<T>(v, z);
  NPD_UNROLL
  for (int e = 0; e < kPerVector<T>; ++e) z[e] = gradient.outside(z[e]);
  store_vector(at, pack<T>(z));
}

// The whole slice as if nothing were in S; padding columns exactly 0.
template <class T, int M>
NPD_DEVICE void overwrite_dense(T* z, int columns, const Slice<T>& slice, const RowGradient<M>& gradient) {
  Vector* vectors = reinterpret_cast<Vector*>(z + slice.head);
  for (int i = slice.begin + thread(); i < slice.end; i += kUnroll * kThreads) {
    Vector v[kUnroll];
    NPD_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * kThreads < slice.end) v[u] = load_before_store(vectors + i + u * kThreads);
    }
    NPD_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * kThreads < slice.end) overwrite_vector<T>(vectors + i + u * kThreads, v[u], gradient);
    }
  }
  if (thread() < slice.ragged()) {
    T* at = z + slice.ragged_column(thread());
    store(at, gradient.outside(to_float(*at)));
  }
  for (int c = slice.valid + split() * kThreads + thread(); c < columns; c += splits() * kThreads) store(z + c, 0.f);
}

// One block for each row and split.
template <class T, int M>
NPD_KERNEL gradient_rows(GradientArguments<T, M> a) {
  const int64_t row = block_row();
  T* z = a.logits.row(row);
  const auto slice = Slice<T>::of(z, a.logits.valid, split(), splits());
  Entry in_S{-1, 0.f}, target{-1, 0.f};
  bool is_target = false;
  if (thread() < a.k) {
    in_S = entry_of_id(a, slice, row, thread());
    is_target = a.ids[row * a.k + thread()] == a.targets[row];
  }
  if (thread() == 0) target = entry_of_target(a, slice, row);
  // No thread may overwrite a logit that another still has to read for its entry.
  const bool target_in_S = sync_block_or(is_target);
  overwrite_dense(z, a.logits.columns, slice, RowGradient<M>::of(a, row));
  sync_block();  // and dense stores must land before those that replace them
  if (in_S.column >= 0) store(z + in_S.column, in_S.value);
  if (target.column >= 0 && !target_in_S) store(z + target.column, target.value);
}

}  // namespace npd
