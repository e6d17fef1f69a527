// Launcher of score.
#include "launch.h"

namespace npd {

template <class T>
void launch_score(const ScoreArguments<T>& a, int splits, float* result, cudaStream_t stream) {
  const int64_t rows = a.logits.rows;
  score_partials<T><<<grid_of(rows, splits), kThreads, score_shared_bytes(), stream>>>(a);
  if (splits == 1) return;
  score_merge<<<small_grid(rows), kSmallThreads, 0, stream>>>(a.partials, splits, rows, a.scale, result);
}

template void launch_score(const ScoreArguments<float>&, int, float*, cudaStream_t);
template void launch_score(const ScoreArguments<BFloat16>&, int, float*, cudaStream_t);
template void launch_score(const ScoreArguments<Float16>&, int, float*, cudaStream_t);

}  // namespace npd
