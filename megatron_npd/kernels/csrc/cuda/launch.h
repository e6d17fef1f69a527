// The launchers of the kernels, without torch: its headers take longer to compile than all kernels together, so only
// operators.cu includes them. Defined in score.cu, topk.cu and loss.cu for float, BFloat16 and Float16.
#pragma once

#include <cuda_runtime.h>

#include "loss_gradient.cuh"
#include "loss_statistics.cuh"
#include "score.cuh"
#include "topk.cuh"

namespace npd {

constexpr int kSmallThreads = 256;

inline dim3 grid_of(int64_t rows, int splits) {
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(splits));
}
inline unsigned small_grid(int64_t rows) { return static_cast<unsigned>((rows + kSmallThreads - 1) / kSmallThreads); }

// `result`: [2, rows], the same memory as the partials where there is one split.
template <class T>
void launch_score(const ScoreArguments<T>& a, int splits, float* result, cudaStream_t stream);

template <class T>
void launch_topk(const TopkArguments<T>& a, cudaStream_t stream);

template <class T, int M>
void launch_statistics(const StatisticsArguments<T, M>& a, int splits, cudaStream_t stream);

template <class T, int M>
void launch_gradient(const GradientArguments<T, M>& a, int splits, cudaStream_t stream);

}  // namespace npd
