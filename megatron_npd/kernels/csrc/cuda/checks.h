// Tensors of the operators: checks that name what is wrong, the device and its stream, dtypes, pointers. Only the
// LibTorch stable ABI of torch 2.10 on, so that one build serves every later torch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>  // no other header brings it in before torch 2.13
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cmath>
#include <initializer_list>

#include "load.cuh"

namespace npd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// Selects a tensor's device for launches and allocations, and has torch's current stream on it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  }
  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0;
};

inline void check_logits(const Tensor& logits, int64_t valid, double inverse_temperature) {
  STD_TORCH_CHECK(logits.is_cuda() && logits.dim() == 2, "logits: must be [T, V] on a CUDA device");
  const auto type = logits.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "logits: must be float32, bfloat16 or float16, got ", name_of(type));
  STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) <= 1, "logits: columns must be adjacent, stride(1) is ",
                  logits.stride(1));
  STD_TORCH_CHECK(logits.size(0) < int64_t{1} << 31 && logits.size(1) < int64_t{1} << 30, "logits: too large: [",
                  logits.size(0), ", ", logits.size(1), "]");
  STD_TORCH_CHECK(valid >= 0 && valid <= logits.size(1), "valid = ", valid, ": must lie in 0..", logits.size(1));
  STD_TORCH_CHECK(std::isfinite(inverse_temperature) && inverse_temperature > 0,
                  "inverse_temperature = ", inverse_temperature, ": must be a positive finite number");
}

// A contiguous tensor of this dtype and shape beside the logits.
inline void check_beside(const Tensor& x, const char* name, const Tensor& logits, ScalarType type,
                         std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == logits.get_device_index(), name,
                  ": must be on the device of the logits");
  STD_TORCH_CHECK(x.scalar_type() == type, name, ": must be ", name_of(type), ", got ", name_of(x.scalar_type()));
  bool same = x.dim() == static_cast<int64_t>(shape.size()) && x.is_contiguous();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(same, name, ": must be contiguous, of ", shape.size(), " dimensions and ", *shape.begin(),
                  " long in the first");
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}

template <class V>
V* data_of(const Tensor& x) {
  return static_cast<V*>(x.data_ptr());
}

template <class T>
Logits<T> logits_of(const Tensor& x, int64_t first, int64_t valid) {
  return {data_of<T>(x), x.stride(0), x.size(0), static_cast<int>(x.size(1)), static_cast<int>(valid), first};
}

// call(T{}) for the element type of the logits.
template <class Call>
void with_element(const Tensor& logits, Call call) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return call(float{});
    case ScalarType::BFloat16: return call(BFloat16{});
    default: return call(Float16{});
  }
}

inline float log2e_over(double inverse_temperature) {
  return static_cast<float>(1.4426950408889634 * inverse_temperature);
}

}  // namespace npd
