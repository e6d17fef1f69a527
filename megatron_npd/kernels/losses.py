"""The distillation loss of logits that exist already, with its hand-written gradient.

`linear.py` is the entry for hidden states; both use the steps of `objective.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_npd.distributed.collectives import over_tensor_ranks
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.kernels.objective import (
    Labels,
    Objective,
    TokenLosses,
    merge_statistics,
    partial_statistics,
    token_losses,
    write_gradient,
)
from megatron_npd.kernels.vocab_parallel import VocabShard


def ce_topk_kl(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_logprobs_TK: torch.Tensor,
    tail_mass_T: torch.Tensor,
    *,
    kd_lambda: float,
    tail: str,
    temperature: float = 1.0,
    parallel: Parallel,
    valid: int,
) -> TokenLosses:
    """(1 - λ)·CE + λ·τ²·KD per token (formulas and sources: `kernels/objective.py`); only `loss` carries a gradient.

    The reference of the fused linear loss, `linear_ce_topk_kl`, on whole logits. The trainer uses that one, and no role
    calls this: it is kept for tests, which hold the fused loss against it, and tools, which time the operators by it.

    Args:
        logits_TV: this rank's student logits, of any float dtype; the gradient has it too.
        targets_T: sampled tokens, int64, in the vocabulary.
        topk_ids_TK: int64, unique in each row. topk_logprobs_TK: of the teacher at `temperature`, nats, float32.
        tail_mass_T: the teacher's mass outside the ids at `temperature`, float32.
        temperature: τ of the KD, for teacher and student alike; CE stays at 1.
        valid: columns of `logits_TV` that are real tokens; the rest is padding and gets no gradient.

    Returns:
        The same values on every tensor-parallel rank.

    Raises:
        ValueError: unknown `tail`, an id twice in a row, or a temperature that is not a positive finite number.
    """
    objective = Objective(kd_lambda, tail, temperature)
    labels = Labels(targets_T, topk_ids_TK, topk_logprobs_TK, tail_mass_T)
    labels.check()
    return TokenLosses(*_CeTopkKl.apply(logits_TV, labels, objective, parallel, valid))


class _CeTopkKl(torch.autograd.Function):
    """Keeps the logits for the backward pass, where their gradient is written to a second tensor."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, labels: Labels, objective: Objective, parallel: Parallel, valid: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shard = VocabShard.of(logits_TV.shape[1], parallel, valid)
        statistics = merge_statistics(
            over_tensor_ranks(partial_statistics(logits_TV, labels, objective, shard), parallel)
        )
        losses = token_losses(statistics, labels, objective)
        ctx.save_for_backward(logits_TV)
        ctx.rest = (statistics, labels, objective, shard)
        ctx.mark_non_differentiable(losses.ce, losses.kd)
        return losses.loss, losses.ce, losses.kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (logits_TV,) = ctx.saved_tensors
        gradient_TV = torch.empty_like(logits_TV)
        write_gradient(logits_TV, gradient_TV, grad_T, *ctx.rest)
        return gradient_TV, None, None, None, None
