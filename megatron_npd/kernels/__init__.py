"""Operators on vocabulary-parallel logits: scores, teacher top-k, the distillation loss.

Logits are [T, V] of any float dtype, of which the first `valid` columns are real tokens
(`mcore.model.valid_vocab_columns`) and the rest is padding that enters no softmax. Ids are global: a rank owns
[first, first + valid) with first = tp_rank * V. Across ranks only a few floats a token travel; results are the same
on every rank.

    vocab_parallel.py   a rank's slice of the vocabulary, chunks, the one collective
    scores.py           scores without gradients
    objective.py        the loss in four steps: statistics, merge over ranks, losses, gradient
    losses.py           the loss of logits
    linear.py           the loss of hidden states, whose logits never exist whole
    native.py           fused operators behind the passes over logits, where they are built and run
    build.py, csrc/     their compilation and their source

Without the operators all of it is plain torch, exact at any layout, in bounded memory, and several times slower.
"""

from megatron_npd.kernels.linear import LinearLosses, linear_ce_topk_kl
from megatron_npd.kernels.losses import ce_topk_kl
from megatron_npd.kernels.objective import TokenLosses
from megatron_npd.kernels.scores import forward_kl, token_logprobs, top_token, topk_logprobs

__all__ = [
    "LinearLosses",
    "TokenLosses",
    "ce_topk_kl",
    "forward_kl",
    "linear_ce_topk_kl",
    "token_logprobs",
    "top_token",
    "topk_logprobs",
]
