// Launchers of loss_statistics and loss_gradient_.
#include "launch.h"

namespace npd {

template <class T, int M>
void launch_statistics(const StatisticsArguments<T, M>& a, int splits, cudaStream_t stream) {
  const int64_t rows = a.logits.rows;
  const size_t shared = statistics_shared_bytes(a.k, a.logits.valid, splits, kPerVector<T>, M);
  statistics_partials<T, M><<<grid_of(rows, splits), kThreads, shared, stream>>>(a);
  statistics_merge<M><<<small_grid(rows), kSmallThreads, 0, stream>>>(a.partials, splits, rows, a.scale,
                                                                      a.inverse_temperature, a.result);
}

template <class T, int M>
void launch_gradient(const GradientArguments<T, M>& a, int splits, cudaStream_t stream) {
  gradient_rows<T, M><<<grid_of(a.logits.rows, splits), kThreads, 0, stream>>>(a);
}

#define NPD_INSTANTIATE(T)                                                               \
  template void launch_statistics(const StatisticsArguments<T, 1>&, int, cudaStream_t); \
  template void launch_statistics(const StatisticsArguments<T, 2>&, int, cudaStream_t); \
  template void launch_gradient(const GradientArguments<T, 1>&, int, cudaStream_t);     \
  template void launch_gradient(const GradientArguments<T, 2>&, int, cudaStream_t)

NPD_INSTANTIATE(float);
NPD_INSTANTIATE(BFloat16);
NPD_INSTANTIATE(Float16);

}  // namespace npd
