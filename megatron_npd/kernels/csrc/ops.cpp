// The operators' schemas. CPU implementations: cpu/operators.cpp; CUDA: a second library that registers its own against
// these. LibTorch's stable ABI only, so one build serves every torch from 2.10 on.
//
// T rows, V columns, K ids a row. Logits are float32, bfloat16 or float16 with any row stride (inner stride 1). Targets
// and ids are global: this rank owns [first, first + valid); its columns from `valid` on are padding and enter nothing.
// inverse_temperature is 1 / temperature; exactly 1.0 is the case of temperature 1.
//
//   score            float32 [3, T]: the largest logit m, the sum of exp((z - m) / temperature), the target's logit (0
//                    where another rank owns it). A row whose mask is false is not read: (-inf, 0, 0), as for no column.
//   topk             float32 [T, K] and int64 [T, K]: the best logits, descending, and their ids (lowest first among
//                    equals; -inf and `first` where there are no more). float32 [2, T]: the largest logit m, and the sum
//                    of exp((z - m) / temperature) over the columns that are not among the best.
//   loss_statistics  float32 [4 or 5, T]: `objective.partial_statistics`.
//   loss_gradient_   overwrites the logits by `objective.write_gradient`; coefficients: float32 [8, T], cpu/loss.h.
//   cpu_isa          the instruction set in use on CPUs; a name other than "" chooses it first.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(megatron_npd, m) {
  m.def(
      "score(Tensor logits, Tensor targets, Tensor? mask, int first, int valid, float inverse_temperature) -> Tensor");
  m.def(
      "topk(Tensor logits, int k, int first, int valid, float inverse_temperature) -> (Tensor, Tensor, Tensor)");
  m.def(
      "loss_statistics(Tensor logits, Tensor targets, Tensor ids, Tensor p, int first, int valid, "
      "float inverse_temperature) -> Tensor");
  m.def(
      "loss_gradient_(Tensor(a!) logits, Tensor targets, Tensor ids, Tensor p, Tensor coefficients, int first, "
      "int valid, float inverse_temperature) -> ()");
  m.def("cpu_isa(str name) -> str");
}
