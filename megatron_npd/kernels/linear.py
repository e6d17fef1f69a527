"""The distillation loss of hidden states: the vocabulary projection and its gradient, a chunk of tokens at a time.

A batch's logits never exist whole. A chunk's logits, once their statistics have been merged over the ranks, are
overwritten by their gradient, which is multiplied out into the gradients of hidden states and weight at once; the
projection is never computed a second time. That is possible because the loss is a sum, whose gradient is known in the
forward pass up to one factor.

Legend: N tokens, C tokens of a chunk, H hidden size, V rows of this rank's weight, K the teacher's top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_npd.distributed.collectives import over_tensor_ranks
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.kernels.objective import (
    Labels,
    Objective,
    merge_statistics,
    partial_statistics,
    token_losses,
    write_gradient,
)
from megatron_npd.kernels.vocab_parallel import VocabShard


@dataclass(frozen=True)
class LinearLosses:
    """Losses of N tokens, float32, nats: their sum, a scalar and the only one with a gradient, and [N] each."""

    total: torch.Tensor
    loss: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor


def linear_ce_topk_kl(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    topk_ids_NK: torch.Tensor,
    topk_logprobs_NK: torch.Tensor,
    tail_mass_N: torch.Tensor,
    *,
    kd_lambda: float,
    tail: str,
    temperature: float = 1.0,
    parallel: Parallel,
    valid: int,
    chunk_tokens: int = 4096,
) -> LinearLosses:
    """Σ (1 - λ)·CE + λ·τ²·KD of logits = hidden @ weight.T (formulas and sources: `kernels/objective.py`).

    At most one [chunk_tokens, V] buffer of logits exists. With a gradient wanted, memory for the gradients of hidden
    states and weight is taken in the forward pass; the backward pass only scales them. More than one chunk sums the
    weight's gradient in float32 and rounds it once.

    **The gradient of `hidden_NH` is this rank's part of it**, from its own rows of the weight. The caller sums it over
    the tensor-parallel ranks by passing hidden states through Megatron's `copy_to_tensor_model_parallel_region`, or
    `gather_from_sequence_parallel_region` under sequence parallelism.

    Args:
        hidden_NH: rows to score, the same on all ranks of the tensor-parallel group. N may be 0.
        weight_VH: this rank's rows of the output layer, of the same dtype.
        targets_N: sampled tokens, int64, in the vocabulary.
        topk_ids_NK: int64, unique in each row. topk_logprobs_NK: of the teacher at `temperature`, nats, float32.
        tail_mass_N: the teacher's mass outside the ids at `temperature`, float32.
        temperature: τ of the KD, for teacher and student alike; CE stays at 1.
        valid: rows of `weight_VH` that are real tokens; the rest is padding (finite) and gets a zero gradient.
        chunk_tokens: tokens projected at a time; one all-gather of four floats a token each (five where τ is not 1).

    Returns:
        The same values on every tensor-parallel rank.

    Raises:
        ValueError: unknown `tail`, an id twice in a row, a temperature that is not a positive finite number, or
            `chunk_tokens` below 1.
    """
    objective = Objective(kd_lambda, tail, temperature)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens!r}: must be at least 1")
    labels = Labels(targets_N, topk_ids_NK, topk_logprobs_NK, tail_mass_N)
    labels.check()
    # Asked here: inside an autograd function gradients are always disabled.
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden_NH, weight_VH))
    return LinearLosses(
        *_LinearCeTopkKl.apply(hidden_NH, weight_VH, labels, objective, parallel, valid, chunk_tokens, wanted)
    )


class _LinearCeTopkKl(torch.autograd.Function):
    """Gradients are computed beside the loss, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels: Labels,
        objective: Objective,
        parallel: Parallel,
        valid: int,
        chunk_tokens: int,
        wanted: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, shard = len(hidden_NH), VocabShard.of(len(weight_VH), parallel, valid)
        losses_3N = torch.empty(3, tokens, dtype=torch.float32, device=hidden_NH.device)
        d_hidden_NH = torch.empty_like(hidden_NH) if wanted[0] else None
        d_weight_VH = _weight_sum(weight_VH, one_term=tokens <= chunk_tokens) if wanted[1] else None
        buffer_CV = hidden_NH.new_empty(min(chunk_tokens, tokens), len(weight_VH))
        for start in range(0, tokens, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, tokens))
            logits_CV = torch.mm(hidden_NH[rows], weight_VH.T, out=buffer_CV[: rows.stop - start])
            chunk = labels[rows]
            statistics = merge_statistics(
                over_tensor_ranks(partial_statistics(logits_CV, chunk, objective, shard), parallel)
            )
            losses = token_losses(statistics, chunk, objective)
            torch.stack([losses.loss, losses.ce, losses.kd], out=losses_3N[:, rows])
            if not any(wanted):
                continue
            write_gradient(logits_CV, logits_CV, torch.ones_like(losses.loss), statistics, chunk, objective, shard)
            if d_hidden_NH is not None:
                torch.mm(logits_CV, weight_VH, out=d_hidden_NH[rows])
            if d_weight_VH is not None:
                _add_product(d_weight_VH, logits_CV.T, hidden_NH[rows])
        if d_weight_VH is not None:
            d_weight_VH = d_weight_VH.to(weight_VH.dtype)
        ctx.save_for_backward(d_hidden_NH, d_weight_VH)
        loss_N, ce_N, kd_N = losses_3N.unbind()
        ctx.mark_non_differentiable(loss_N, ce_N, kd_N)
        return loss_N.sum(), loss_N, ce_N, kd_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = grad.item()
        # Not in place: with retain_graph they are needed again.
        gradients = [x if x is None or scale == 1 else x * scale for x in ctx.saved_tensors]
        return (*gradients, None, None, None, None, None, None)


def _weight_sum(weight_VH: torch.Tensor, one_term: bool) -> torch.Tensor:
    """Zeros to sum the weight's gradient in: of its own dtype if one chunk gives all of it, else float32 or wider."""
    dtype = weight_VH.dtype if one_term else torch.promote_types(weight_VH.dtype, torch.float32)
    return torch.zeros_like(weight_VH, dtype=dtype)


def _add_product(sum_VH: torch.Tensor, g_VC: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """sum += g @ hidden, where the sum may be wider than the factors."""
    if sum_VH.dtype == g_VC.dtype:
        sum_VH.addmm_(g_VC, hidden_CH)
    else:
        sum_VH.add_(torch.mm(g_VC, hidden_CH))
