// The operators on CUDA tensors. Schemas and their meaning: ../ops.cpp.
#include <optional>
#include <tuple>

#include "checks.h"
#include "launch.h"

namespace npd {

constexpr size_t kSharedLimit = 48 * 1024;  // what every device gives without being asked

const bool* mask_of(const std::optional<Tensor>& mask) { return mask ? data_of<const bool>(*mask) : nullptr; }

Tensor score(const Tensor& logits, const Tensor& targets, std::optional<Tensor> mask, int64_t first, int64_t valid,
             double inverse_temperature) {
  check_logits(logits, valid, inverse_temperature);
  const int64_t rows = logits.size(0);
  check_beside(targets, "targets", logits, ScalarType::Long, {rows});
  if (mask) check_beside(*mask, "mask", logits, ScalarType::Bool, {rows});
  const OnDevice device(logits);
  Tensor result = new_tensor(logits, {3, rows}, ScalarType::Float);
  if (rows == 0) return result;
  float* out = data_of<float>(result);
  with_element(logits, [&](auto x) {
    using T = decltype(x);
    const int splits = splits_of(rows, valid, kPerVector<T>, device.multiprocessors());
    // One split's partials have the layout of the result.
    const Tensor partials = splits == 1 ? result : new_tensor(logits, {2, splits, rows}, ScalarType::Float);
    ScoreArguments<T> a{logits_of<const T>(logits, first, valid),
                        data_of<const int64_t>(targets),
                        mask_of(mask),
                        Scale<1>{{log2e_over(inverse_temperature)}},
                        data_of<float>(partials),
                        out + 2 * rows};
    launch_score(a, splits, out, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

std::tuple<Tensor, Tensor, Tensor> topk(const Tensor& logits, int64_t k, int64_t first, int64_t valid,
                                        double inverse_temperature) {
  check_logits(logits, valid, inverse_temperature);
  STD_TORCH_CHECK(k >= 1 && k <= kMaxTop, "k = ", k, ": must lie in 1..", kMaxTop);
  const int64_t rows = logits.size(0);
  const OnDevice device(logits);
  Tensor values = new_tensor(logits, {rows, k}, ScalarType::Float);
  Tensor ids = new_tensor(logits, {rows, k}, ScalarType::Long);
  Tensor rest = new_tensor(logits, {2, rows}, ScalarType::Float);
  if (rows == 0) return {values, ids, rest};
  with_element(logits, [&](auto x) {
    using T = decltype(x);
    TopkArguments<T> a{logits_of<const T>(logits, first, valid),
                       static_cast<int>(k),
                       Scale<1>{{log2e_over(inverse_temperature)}},
                       data_of<float>(values),
                       data_of<int64_t>(ids),
                       data_of<float>(rest)};
    launch_topk(a, device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {values, ids, rest};
}

void check_labels(const Tensor& logits, const Tensor& targets, const Tensor& ids, const Tensor& p) {
  const int64_t rows = logits.size(0), k = ids.dim() == 2 ? ids.size(1) : 0;
  check_beside(targets, "targets", logits, ScalarType::Long, {rows});
  check_beside(ids, "ids", logits, ScalarType::Long, {rows, k});
  check_beside(p, "p", logits, ScalarType::Float, {rows, k});
  STD_TORCH_CHECK(k <= kMaxIds, "ids: at most ", kMaxIds, " a token, got ", k);
}

// As many splits as keep the bits of a slice in shared memory: more than one from some 380,000 columns on.
int statistics_splits(int splits, int columns, int k, int per_vector, int sums) {
  while (statistics_shared_bytes(k, columns, splits, per_vector, sums) > kSharedLimit) ++splits;
  return splits;
}

Tensor loss_statistics(const Tensor& logits, const Tensor& targets, const Tensor& ids, const Tensor& p, int64_t first,
                       int64_t valid, double inverse_temperature) {
  check_logits(logits, valid, inverse_temperature);
  check_labels(logits, targets, ids, p);
  const OnDevice device(logits);
  const int64_t rows = logits.size(0);
  const int k = static_cast<int>(ids.size(1)), sums = inverse_temperature == 1 ? 1 : 2;
  Tensor result = new_tensor(logits, {3 + sums, rows}, ScalarType::Float);
  if (rows == 0) return result;
  with_element(logits, [&](auto x) {
    using T = decltype(x);
    const int wanted = splits_of(rows, valid, kPerVector<T>, device.multiprocessors());
    const int splits = statistics_splits(wanted, static_cast<int>(valid), k, kPerVector<T>, sums);
    const Tensor partials = new_tensor(logits, {splits + 1, 1 + sums, rows}, ScalarType::Float);
    const auto run = [&](auto scale) {
      constexpr int M = sizeof(scale) / sizeof(float);
      StatisticsArguments<T, M> a{logits_of<const T>(logits, first, valid),
                                  data_of<const int64_t>(targets),
                                  data_of<const int64_t>(ids),
                                  data_of<const float>(p),
                                  k,
                                  static_cast<float>(inverse_temperature),
                                  scale,
                                  data_of<float>(partials),
                                  data_of<float>(result)};
      launch_statistics(a, splits, device.stream());
    };
    if (sums == 1) run(Scale<1>{{kLog2e}});
    if (sums == 2) run(Scale<2>{{log2e_over(inverse_temperature), kLog2e}});
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

template <class T, int M>
void gradient(const Logits<T>& logits, const Tensor& targets, const Tensor& ids, const Tensor& p,
              const Tensor& coefficients, double inverse_temperature, const OnDevice& device) {
  GradientArguments<T, M> a{logits,
                            data_of<const int64_t>(targets),
                            data_of<const int64_t>(ids),
                            data_of<const float>(p),
                            data_of<const float>(coefficients),
                            static_cast<int>(ids.size(1)),
                            log2e_over(inverse_temperature)};
  const int splits = splits_of(logits.rows, logits.valid, kPerVector<T>, device.multiprocessors());
  launch_gradient(a, splits, device.stream());
}

void loss_gradient_(Tensor logits, const Tensor& targets, const Tensor& ids, const Tensor& p,
                    const Tensor& coefficients, int64_t first, int64_t valid, double inverse_temperature) {
  check_logits(logits, valid, inverse_temperature);
  check_labels(logits, targets, ids, p);
  const int64_t rows = logits.size(0);
  check_beside(coefficients, "coefficients", logits, ScalarType::Float, {kCoefficients, rows});
  STD_TORCH_CHECK(rows <= 1 || logits.stride(0) >= logits.size(1), "logits: rows overlap, stride(0) is ",
                  logits.stride(0));
  if (rows == 0) return;
  const OnDevice device(logits);
  with_element(logits, [&](auto x) {
    using T = decltype(x);
    const auto run = inverse_temperature == 1 ? gradient<T, 1> : gradient<T, 2>;
    run(logits_of<T>(logits, first, valid), targets, ids, p, coefficients, inverse_temperature, device);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace npd

STABLE_TORCH_LIBRARY_IMPL(megatron_npd, CUDA, m) {
  m.impl("score", TORCH_BOX(&npd::score));
  m.impl("topk", TORCH_BOX(&npd::topk));
  m.impl("loss_statistics", TORCH_BOX(&npd::loss_statistics));
  m.impl("loss_gradient_", TORCH_BOX(&npd::loss_gradient_));
}
