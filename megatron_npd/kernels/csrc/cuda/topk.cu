// Launcher of topk.
#include "launch.h"

namespace npd {

template <class T>
void launch_topk(const TopkArguments<T>& a, cudaStream_t stream) {
  topk_rows<T><<<grid_of(a.logits.rows, 1), kThreads, sizeof(TopkShared), stream>>>(a);
}

template void launch_topk(const TopkArguments<float>&, cudaStream_t);
template void launch_topk(const TopkArguments<BFloat16>&, cudaStream_t);
template void launch_topk(const TopkArguments<Float16>&, cudaStream_t);

}  // namespace npd
