// The operators of ops.cpp on CPUs: what they ask of their tensors, and the loop over rows. Rows are independent and a
// row belongs to one thread, so results are the same bits whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>

#include "isa.h"
#include "loss.h"
#include "score.h"
#include "shard.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using npd::Shard;

void check_matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, ": must have two dimensions");
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, ": must have inner stride 1");
}

Shard check_shard(const Tensor& logits, int64_t first, int64_t valid) {
  STD_TORCH_CHECK(first >= 0 && 0 <= valid && valid <= logits.size(1), "first = ", first, ", valid = ", valid,
                  ": must be a slice of the vocabulary of at most ", logits.size(1), " columns");
  return {first, valid};
}

// The data of a small contiguous argument of this type and shape.
template <class T>
const T* data_of(const Tensor& x, const char* name, ScalarType type, int64_t rows, int64_t columns = -1) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous(), name, ": wrong dtype, or not contiguous");
  STD_TORCH_CHECK(x.dim() == (columns < 0 ? 1 : 2) && x.size(0) == rows && (columns < 0 || x.size(1) == columns), name,
                  ": wrong shape");
  return static_cast<const T*>(x.const_data_ptr());
}

const bool* mask_of(const std::optional<Tensor>& mask, int64_t rows) {
  return mask ? data_of<bool>(*mask, "mask", ScalarType::Bool, rows) : nullptr;
}

// Calls work(element, passes) with an element of the logits' type.
template <class Work>
void with_passes(const Tensor& logits, const Work& work) {
  const npd::InstructionSet& set = *npd::current_instruction_set().load();
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return work(float{}, set.passes(float{}));
    case ScalarType::BFloat16:
      return work(npd::Bfloat16{}, set.passes(npd::Bfloat16{}));
    case ScalarType::Half:
      return work(npd::Half{}, set.passes(npd::Half{}));
    default:
      STD_TORCH_CHECK(false, "logits: must be float32, bfloat16 or float16");
  }
}

// Calls work(begin, end) on ranges of rows that are worth a thread.
template <class Work>
void over_rows(const Tensor& logits, const Work& work) {
  constexpr int64_t kElementsOfATask = 32768;
  const int64_t columns = logits.size(1) > 0 ? logits.size(1) : 1;
  torch::stable::parallel_for(0, logits.size(0), 1 + kElementsOfATask / columns, work);
}

Tensor score(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& mask, int64_t first,
             int64_t valid, double inverse_temperature) {
  check_matrix(logits, "logits");
  const Shard shard = check_shard(logits, first, valid);
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  const int64_t* target = data_of<int64_t>(targets, "targets", ScalarType::Long, rows);
  const bool* kept = mask_of(mask, rows);
  Tensor result = torch::stable::new_empty(logits, {3, rows}, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  with_passes(logits, [&](auto element, const auto& passes) {
    const auto* from = static_cast<const decltype(element)*>(logits.const_data_ptr());
    over_rows(logits, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (kept && !kept[t]) {
          npd::skip_row(to + t, rows);
        } else {
          npd::score_row(passes, from + t * stride, shard, target[t], static_cast<float>(inverse_temperature), to + t,
                         rows);
        }
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> topk(const Tensor& logits, int64_t k, int64_t first, int64_t valid,
                                        double inverse_temperature) {
  check_matrix(logits, "logits");
  STD_TORCH_CHECK(k >= 0, "k = ", k, ": must not be negative");
  const Shard shard = check_shard(logits, first, valid);
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  Tensor values = torch::stable::new_empty(logits, {rows, k}, ScalarType::Float);
  Tensor ids = torch::stable::new_empty(logits, {rows, k}, ScalarType::Long);
  Tensor rest = torch::stable::new_empty(logits, {2, rows}, ScalarType::Float);
  float* to_values = static_cast<float*>(values.mutable_data_ptr());
  int64_t* to_ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  float* to_rest = static_cast<float*>(rest.mutable_data_ptr());
  with_passes(logits, [&](auto element, const auto& passes) {
    const auto* from = static_cast<const decltype(element)*>(logits.const_data_ptr());
    over_rows(logits, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> skipped;
      for (int64_t t = begin; t < end; ++t) {
        npd::best_of_row(passes, from + t * stride, shard, k, static_cast<float>(inverse_temperature), skipped,
                         to_values + t * k, to_ids + t * k, to_rest + t, rows);
      }
    });
  });
  return {values, ids, rest};
}

Tensor loss_statistics(const Tensor& logits, const Tensor& targets, const Tensor& ids, const Tensor& p, int64_t first,
                       int64_t valid, double inverse_temperature) {
  check_matrix(logits, "logits");
  check_matrix(ids, "ids");
  const Shard shard = check_shard(logits, first, valid);
  const int64_t rows = logits.size(0), stride = logits.stride(0), k = ids.size(1);
  const int64_t* target = data_of<int64_t>(targets, "targets", ScalarType::Long, rows);
  const int64_t* id = data_of<int64_t>(ids, "ids", ScalarType::Long, rows, k);
  const float* mass = data_of<float>(p, "p", ScalarType::Float, rows, k);
  const bool at_one = inverse_temperature != 1.0;  // in float64: the caller's own test, on the same number
  Tensor result = torch::stable::new_empty(logits, {at_one ? 5 : 4, rows}, ScalarType::Float);
  float* to = static_cast<float*>(result.mutable_data_ptr());
  with_passes(logits, [&](auto element, const auto& passes) {
    const auto* from = static_cast<const decltype(element)*>(logits.const_data_ptr());
    over_rows(logits, [&](int64_t begin, int64_t end) {
      npd::Scratch scratch;
      for (int64_t t = begin; t < end; ++t) {
        const npd::Teacher teacher{id + t * k, mass + t * k, k};
        npd::statistics_of_row(passes, from + t * stride, shard, target[t], teacher,
                               static_cast<float>(inverse_temperature), at_one, scratch, to + t, rows);
      }
    });
  });
  return result;
}

void loss_gradient_(Tensor logits, const Tensor& targets, const Tensor& ids, const Tensor& p,
                    const Tensor& coefficients, int64_t first, int64_t valid, double inverse_temperature) {
  check_matrix(logits, "logits");
  check_matrix(ids, "ids");
  const Shard shard = check_shard(logits, first, valid);
  const int64_t rows = logits.size(0), stride = logits.stride(0), k = ids.size(1);
  const int64_t* target = data_of<int64_t>(targets, "targets", ScalarType::Long, rows);
  const int64_t* id = data_of<int64_t>(ids, "ids", ScalarType::Long, rows, k);
  const float* mass = data_of<float>(p, "p", ScalarType::Float, rows, k);
  const float* c = data_of<float>(coefficients, "coefficients", ScalarType::Float, npd::kCoefficients, rows);
  with_passes(logits, [&](auto element, const auto& passes) {
    auto* buffer = static_cast<decltype(element)*>(logits.mutable_data_ptr());
    over_rows(logits, [&](int64_t begin, int64_t end) {
      npd::Scratch scratch;
      for (int64_t t = begin; t < end; ++t) {
        const npd::Teacher teacher{id + t * k, mass + t * k, k};
        npd::gradient_of_row(passes, buffer + t * stride, logits.size(1), shard, target[t], teacher,
                             npd::coefficients_at(c + t, rows), static_cast<float>(inverse_temperature),
                             inverse_temperature != 1.0, scratch);
      }
    });
  });
}

std::string cpu_isa(const std::string& name) {
  if (!name.empty()) npd::current_instruction_set() = &npd::find_instruction_set(name);
  return npd::current_instruction_set().load()->name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_npd, CPU, m) {
  m.impl("score", TORCH_BOX(&score));
  m.impl("topk", TORCH_BOX(&topk));
  m.impl("loss_statistics", TORCH_BOX(&loss_statistics));
  m.impl("loss_gradient_", TORCH_BOX(&loss_gradient_));
}

STABLE_TORCH_LIBRARY_IMPL(megatron_npd, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
