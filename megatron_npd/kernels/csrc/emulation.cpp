// The CUDA kernels on the host, thread for thread, as a plain C library for tests/test_cuda_emulation.py. What runs is
// the source of the device kernels; only the machine below them is emulated (emulated_block.h, emulated_operations.h).
//
//   g++ -std=c++17 -O2 -ffp-contract=off -fPIC -shared emulation.cpp -o emulation.so     on x86-64 with -mfma -mf16c
//
// Pointers are to host memory, laid out as the operators' tensors; `splits` is chosen by the caller and `descending` is
// the order of threads between barriers.
#include "emulated_block.h"

#include "cuda/loss_gradient.cuh"
#include "cuda/loss_statistics.cuh"
#include "cuda/score.cuh"
#include "cuda/topk.cuh"

namespace {

using namespace npd;

struct Shape {
  int64_t stride, rows, columns, first, valid;
};

template <class T>
Logits<T> logits_of(void* data, const Shape& s) {
  return {static_cast<T*>(data), s.stride, s.rows, static_cast<int>(s.columns), static_cast<int>(s.valid), s.first};
}

// dtype: 0 float32, 1 bfloat16, 2 float16.
template <class Call>
void with_element(int dtype, Call call) {
  if (dtype == 0) call(float{});
  if (dtype == 1) call(BFloat16{});
  if (dtype == 2) call(Float16{});
}

template <class Kernel>
void launch_small(int64_t rows, bool descending, Kernel kernel) {
  launch((rows + 255) / 256, 1, 256, descending, kernel);
}

float log2e_over(float inverse_temperature) { return static_cast<float>(1.4426950408889634 * inverse_temperature); }

template <class T>
void score(void* data, const Shape& s, const int64_t* targets, const bool* mask, float inverse_temperature,
           float* result, int splits, bool descending) {
  std::vector<float> workspace(2 * splits * s.rows, NAN);
  const Scale<1> scale{{log2e_over(inverse_temperature)}};
  ScoreArguments<T> a{logits_of<const T>(data, s), targets, mask, scale, splits == 1 ? result : workspace.data(),
                      result + 2 * s.rows};
  launch(s.rows, splits, kThreads, descending, [=] { score_partials(a); });
  if (splits == 1) return;
  launch_small(s.rows, descending, [&] { score_merge(workspace.data(), splits, s.rows, scale, result); });
}

template <class T, int M>
void statistics(void* data, const Shape& s, const int64_t* targets, const int64_t* ids, const float* p, int k,
                float inverse_temperature, float* result, int splits, bool descending) {
  std::vector<float> workspace((splits + 1) * (1 + M) * s.rows, NAN);
  Scale<M> scale{{log2e_over(inverse_temperature)}};
  if constexpr (M == 2) scale.k[1] = kLog2e;
  if (statistics_shared_bytes(k, s.columns, splits, kPerVector<T>, M) > sizeof block.shared) fail("shared memory");
  StatisticsArguments<T, M> a{logits_of<const T>(data, s), targets, ids, p, k, inverse_temperature, scale,
                              workspace.data(), result};
  launch(s.rows, splits, kThreads, descending, [=] { statistics_partials(a); });
  launch_small(s.rows, descending, [&] {
    statistics_merge<M>(workspace.data(), splits, s.rows, scale, inverse_temperature, result);
  });
}

template <class T, int M>
void gradient(void* data, const Shape& s, const int64_t* targets, const int64_t* ids, const float* p, int k,
              const float* coefficients, float inverse_temperature, int splits, bool descending) {
  GradientArguments<T, M> a{logits_of<T>(data, s), targets, ids, p, coefficients, k, log2e_over(inverse_temperature)};
  launch(s.rows, splits, kThreads, descending, [=] { gradient_rows(a); });
}

}  // namespace

extern "C" {

int npd_splits(int64_t rows, int64_t columns, int per_vector, int multiprocessors) {
  return splits_of(rows, columns, per_vector, multiprocessors);
}

void npd_score(int dtype, void* logits, const Shape* shape, const int64_t* targets, const bool* mask,
               float inverse_temperature, float* result, int splits, int descending) {
  with_element(dtype, [&](auto x) {
    score<decltype(x)>(logits, *shape, targets, mask, inverse_temperature, result, splits, descending);
  });
}

void npd_topk(int dtype, void* logits, const Shape* shape, int k, float inverse_temperature, float* values,
              int64_t* ids, float* rest, int descending) {
  with_element(dtype, [&](auto x) {
    TopkArguments<decltype(x)> a{logits_of<const decltype(x)>(logits, *shape), k,
                                 Scale<1>{{log2e_over(inverse_temperature)}}, values, ids, rest};
    launch(shape->rows, 1, kThreads, descending, [=] { topk_rows(a); });
  });
}

void npd_loss_statistics(int dtype, void* logits, const Shape* shape, const int64_t* targets, const int64_t* ids,
                         const float* p, int k, float inverse_temperature, float* result, int splits,
                         int descending) {
  with_element(dtype, [&](auto x) {
    auto run = inverse_temperature == 1.f ? statistics<decltype(x), 1> : statistics<decltype(x), 2>;
    run(logits, *shape, targets, ids, p, k, inverse_temperature, result, splits, descending);
  });
}

void npd_loss_gradient(int dtype, void* logits, const Shape* shape, const int64_t* targets, const int64_t* ids,
                       const float* p, int k, const float* coefficients, float inverse_temperature, int splits,
                       int descending) {
  with_element(dtype, [&](auto x) {
    auto run = inverse_temperature == 1.f ? gradient<decltype(x), 1> : gradient<decltype(x), 2>;
    run(logits, *shape, targets, ids, p, k, coefficients, inverse_temperature, splits, descending);
  });
}

}  // extern "C"
