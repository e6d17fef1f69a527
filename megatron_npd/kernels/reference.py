"""Plain-torch operators on vocabulary-parallel logits, exact at any layout, in bounded memory.

Legend: T tokens, V columns of this rank's logits, K the teacher's top-k. Logits are [T, V] of any float dtype, of
which the first `valid` columns are real tokens (`mcore.model.valid_vocab_columns`) and the rest is padding that
enters no softmax. Ids are global: this rank owns [first, first + valid) with first = tp_rank * V. Everything is
computed in float32 over chunks of `CHUNK` tokens, so no [T, V] float32 temporary exists.

Across ranks only a few floats a token travel, by one all-gather; results are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_npd.parallel import Parallel

CHUNK = 64
"""Tokens whose logits are held in float32 at a time: few enough to stay in a CPU's cache between passes."""


@dataclass(frozen=True)
class TokenLosses:
    """Per-token results of `ce_topk_kl`, float32 [T], nats; only `loss` carries a gradient."""

    loss: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor


def token_logprobs(logits_TV: torch.Tensor, targets_T: torch.Tensor, parallel: Parallel, valid: int) -> torch.Tensor:
    """log softmax(logits)[target], float32 [T]. No gradient."""
    first = parallel.tp_rank * logits_TV.shape[1]
    partials = [
        torch.stack([torch.logsumexp(z_CV, -1), _owned(z_CV, targets_T[rows, None], first).sum(-1)])
        for rows, z_CV in _chunks(logits_TV, valid)
    ]
    lse_RT, target_RT = _gather(torch.cat(partials, 1), parallel).unbind(1)
    return target_RT.sum(0) - torch.logsumexp(lse_RT, 0)


def topk_logprobs(
    logits_TV: torch.Tensor, k: int, parallel: Parallel, valid: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most probable ids, their log-probabilities (descending) and the mass outside them.

    Only each rank's own k best travel, never the vocabulary.

    Returns:
        int64 [T, K], float32 [T, K], float32 [T]. The mass is computed from the tail itself, not as 1 - sum.
    """
    first = parallel.tp_rank * logits_TV.shape[1]
    values, ids, lses = [], [], []
    for _, z_CV in _chunks(logits_TV, valid):
        value, column = z_CV.topk(min(k, valid), -1)
        values.append(_pad_columns(value, k, -torch.inf))
        ids.append(_pad_columns(column + first, k, 0))
        lses.append(torch.logsumexp(z_CV, -1))
    value_RTK = _gather(torch.cat(values), parallel)
    id_RTK = _gather(torch.cat(ids), parallel)
    lse_T = torch.logsumexp(_gather(torch.cat(lses), parallel), 0)
    best_TK, choice_TK = value_RTK.permute(1, 0, 2).flatten(1).topk(k, -1)
    ids_TK = id_RTK.permute(1, 0, 2).flatten(1).gather(1, choice_TK)
    tail_lse_T = _two_logsumexps(logits_TV, ids_TK, first, valid, parallel)[1]
    return ids_TK, best_TK - lse_T[:, None], torch.exp(tail_lse_T - lse_T)


def top_token(logits_TV: torch.Tensor, parallel: Parallel, valid: int) -> torch.Tensor:
    """The most probable id, int64 [T]; the lowest of equals."""
    first = parallel.tp_rank * logits_TV.shape[1]
    best = [z_CV.max(-1) for _, z_CV in _chunks(logits_TV, valid)]
    value_RT = _gather(torch.cat([b.values for b in best]), parallel)
    id_RT = _gather(torch.cat([b.indices for b in best]) + first, parallel)
    return id_RT.gather(0, value_RT.argmax(0, keepdim=True))[0]


def forward_kl(teacher_TV: torch.Tensor, student_TV: torch.Tensor, parallel: Parallel, valid: int) -> torch.Tensor:
    """KL(teacher || student) over the whole vocabulary, float32 [T], nats. No gradient."""
    lses = [
        torch.stack([torch.logsumexp(p_CV, -1), torch.logsumexp(q_CV, -1)])
        for (_, p_CV), (_, q_CV) in zip(_chunks(teacher_TV, valid), _chunks(student_TV, valid), strict=True)
    ]
    lse_p_T, lse_q_T = torch.logsumexp(_gather(torch.cat(lses, 1), parallel), 0)
    parts = []
    for (rows, p_CV), (_, q_CV) in zip(_chunks(teacher_TV, valid), _chunks(student_TV, valid), strict=True):
        log_p_CV, log_q_CV = p_CV - lse_p_T[rows, None], q_CV - lse_q_T[rows, None]
        # A token the teacher excludes (-inf) contributes 0, not NaN.
        parts.append(torch.where(log_p_CV > -torch.inf, log_p_CV.exp() * (log_p_CV - log_q_CV), 0.0).sum(-1))
    return _gather(torch.cat(parts), parallel).sum(0)


def ce_topk_kl(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_logprobs_TK: torch.Tensor,
    tail_mass_T: torch.Tensor,
    *,
    kd_lambda: float,
    tail: str,
    parallel: Parallel,
    valid: int,
) -> TokenLosses:
    """(1 - λ)·CE + λ·KD per token, with the hand-written gradient of shared/method.md (arXiv 2605.05940).

    With p the teacher on its top-k ids S, q the student, P = Σ_S p, Q = Σ_S q, KD is for each `tail`

        none          Σ_S p log(p / q)                                            can be negative, never clamped
        bucket        Σ_S p log(p / q) + (1 - P) log((1 - P) / (1 - Q))           >= 0
        renormalize   KL of p / P against q / Q on S                              >= 0

    Args:
        logits_TV: this rank's student logits; the gradient has their dtype.
        targets_T: sampled tokens, int64, in the vocabulary.
        topk_ids_TK: int64, unique in each row. topk_logprobs_TK: float32. tail_mass_T: 1 - P, float32.

    Raises:
        ValueError: unknown `tail`, or an id twice in a row.
    """
    if tail not in ("none", "bucket", "renormalize"):
        raise ValueError(f"tail = {tail!r}: must be none, bucket or renormalize")
    ordered = topk_ids_TK.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("topk_ids_TK: ids must be unique in each row")
    loss, ce, kd = _CeTopkKl.apply(
        logits_TV, targets_T, topk_ids_TK, topk_logprobs_TK, tail_mass_T, kd_lambda, tail, parallel, valid
    )
    return TokenLosses(loss, ce, kd)


class _CeTopkKl(torch.autograd.Function):
    """Four floats a token travel: logsumexp inside and outside S, Σ_S p·z, and z of the target."""

    @staticmethod
    def forward(ctx: Any, logits_TV, targets_T, ids_TK, logprobs_TK, tail_mass_T, kd_lambda, tail, parallel, valid):
        first = parallel.tp_rank * logits_TV.shape[1]
        p_TK = logprobs_TK.float().exp()
        parts = []
        for rows, z_CV in _chunks(logits_TV, valid):
            own_S_CK, z_S_CK = _is_owned(ids_TK[rows], first, valid), _owned(z_CV, ids_TK[rows], first)
            target = _owned(z_CV, targets_T[rows, None], first).sum(-1)
            inside = torch.logsumexp(z_S_CK.masked_fill(~own_S_CK, -torch.inf), -1)
            outside = torch.logsumexp(_without(z_CV, ids_TK[rows], first), -1)  # last: it overwrites the chunk
            parts.append(torch.stack([inside, outside, (p_TK[rows] * z_S_CK).sum(-1), target]))
        inside_RT, outside_RT, pz_RT, target_RT = _gather(torch.cat(parts, 1), parallel).unbind(1)
        lse_S_T, lse_tail_T = torch.logsumexp(inside_RT, 0), torch.logsumexp(outside_RT, 0)
        lse_T = torch.logaddexp(lse_S_T, lse_tail_T)
        ce_T = lse_T - target_RT.sum(0)
        p_sum_T = p_TK.sum(-1)
        # Σ_S p log p - Σ_S p z is common to all three; what it is normalised by differs.
        kd_T = (p_TK * logprobs_TK).sum(-1) - pz_RT.sum(0)
        if tail == "renormalize":
            kd_T = (kd_T + p_sum_T * lse_S_T) / p_sum_T - p_sum_T.log()
        else:
            kd_T = kd_T + p_sum_T * lse_T
        if tail == "bucket":
            has_tail_T = tail_mass_T > 0
            log_ratio_T = tail_mass_T.clamp_min(torch.finfo(torch.float32).tiny).log() - (lse_tail_T - lse_T)
            kd_T = kd_T + torch.where(has_tail_T, tail_mass_T * log_ratio_T, 0.0)
        lse_tail_T = torch.where(lse_tail_T == -torch.inf, lse_T, lse_tail_T)  # no tail at all: its softmax is 0
        ctx.save_for_backward(logits_TV, targets_T, ids_TK, p_TK, p_sum_T, tail_mass_T, lse_T, lse_S_T, lse_tail_T)
        ctx.settings = (kd_lambda, tail, first, valid)
        ctx.mark_non_differentiable(ce_T, kd_T)
        return (1 - kd_lambda) * ce_T + kd_lambda * kd_T, ce_T, kd_T

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor, *_: torch.Tensor):
        logits_TV, targets_T, ids_TK, p_TK, p_sum_T, tail_mass_T, lse_T, lse_S_T, lse_tail_T = ctx.saved_tensors
        kd_lambda, tail, first, valid = ctx.settings
        ce_weight = 1 - kd_lambda
        # Outside S every gradient is a factor times the tail's own softmax exp(z - lse_tail), which is at most 1:
        # stable however little mass the student leaves there, and one exp for the whole row.
        tail_q_T = torch.exp(lse_tail_T - lse_T)  # 1 - Q
        kd_outside_T = {"none": p_sum_T * tail_q_T, "bucket": tail_q_T - tail_mass_T, "renormalize": 0.0}[tail]
        factor_T = grad_T * (ce_weight * tail_q_T + kd_lambda * kd_outside_T)
        gradient_TV = torch.zeros_like(logits_TV)
        for rows, z_CV in _chunks(logits_TV, valid):
            z_S_CK, p_CK, lse_C1 = _owned(z_CV, ids_TK[rows], first), p_TK[rows], lse_T[rows, None]
            q_CK = torch.exp(z_S_CK - lse_C1)
            if tail == "none":
                kd_CK = p_sum_T[rows, None] * q_CK - p_CK
            elif tail == "bucket":
                kd_CK = q_CK - p_CK
            else:
                kd_CK = torch.exp(z_S_CK - lse_S_T[rows, None]) - p_CK / p_sum_T[rows, None]
            inside_CK = (ce_weight * q_CK + kd_lambda * kd_CK) * grad_T[rows, None]
            outside_CV = z_CV.sub_(lse_tail_T[rows, None]).exp_().mul_(factor_T[rows, None])
            chunk_CV = _overwrite(outside_CV, ids_TK[rows], inside_CK, first)
            chunk_CV = _add_at(chunk_CV, targets_T[rows, None], -ce_weight * grad_T[rows, None], first)
            gradient_TV[rows, :valid] = chunk_CV
        return gradient_TV, None, None, None, None, None, None, None, None


def _chunks(logits_TV: torch.Tensor, valid: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, float32 [rows, valid]) of successive chunks; copies, which the caller may overwrite."""
    for start in range(0, len(logits_TV), CHUNK):
        rows = slice(start, min(start + CHUNK, len(logits_TV)))
        yield rows, logits_TV[rows, :valid].detach().to(torch.float32, copy=True)


def _is_owned(ids_CK: torch.Tensor, first: int, valid: int) -> torch.Tensor:
    """Which ids lie on this rank. An id of another rank must never alias a local column."""
    return (ids_CK >= first) & (ids_CK < first + valid)


def _owned(z_CV: torch.Tensor, ids_CK: torch.Tensor, first: int) -> torch.Tensor:
    """Logits at global ids, float32 [C, K]; 0 for ids of other ranks."""
    mine_CK = _is_owned(ids_CK, first, z_CV.shape[1])
    return torch.where(mine_CK, z_CV.gather(1, torch.where(mine_CK, ids_CK - first, 0)), 0.0)


def _without(z_CV: torch.Tensor, ids_CK: torch.Tensor, first: int) -> torch.Tensor:
    """`z_CV` with -inf at the global ids that this rank owns, in place."""
    return _overwrite(z_CV, ids_CK, torch.full_like(ids_CK, -torch.inf, dtype=z_CV.dtype), first)


def _overwrite(into_CV: torch.Tensor, ids_CK: torch.Tensor, values_CK: torch.Tensor, first: int) -> torch.Tensor:
    """Put values at the global ids this rank owns, in place."""
    row, place = _is_owned(ids_CK, first, into_CV.shape[1]).nonzero(as_tuple=True)
    into_CV[row, ids_CK[row, place] - first] = values_CK[row, place]
    return into_CV


def _add_at(into_CV: torch.Tensor, ids_C1: torch.Tensor, values_C1: torch.Tensor, first: int) -> torch.Tensor:
    """Add values at one global id a row, in place, where this rank owns it."""
    row, place = _is_owned(ids_C1, first, into_CV.shape[1]).nonzero(as_tuple=True)
    into_CV[row, ids_C1[row, place] - first] += values_C1[row, place]
    return into_CV


def _pad_columns(x_CK: torch.Tensor, k: int, value: float) -> torch.Tensor:
    """Widen to k columns: a shard may hold fewer than k tokens."""
    return torch.nn.functional.pad(x_CK, (0, k - x_CK.shape[1]), value=value)


def _two_logsumexps(
    logits_TV: torch.Tensor, ids_TK: torch.Tensor, first: int, valid: int, parallel: Parallel
) -> tuple[torch.Tensor, torch.Tensor]:
    """logsumexp over the ids and over everything else, each float32 [T]."""
    parts = []
    for rows, z_CV in _chunks(logits_TV, valid):
        own_CK = _is_owned(ids_TK[rows], first, valid)
        inside = torch.logsumexp(_owned(z_CV, ids_TK[rows], first).masked_fill(~own_CK, -torch.inf), -1)
        parts.append(torch.stack([inside, torch.logsumexp(_without(z_CV, ids_TK[rows], first), -1)]))
    inside_T, outside_T = torch.logsumexp(_gather(torch.cat(parts, 1), parallel), 0)
    return inside_T, outside_T


def _gather(x: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """Every tensor-parallel rank's x, stacked: [R, ...]."""
    if parallel.tp_group is None:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(parallel.tp_size)]
    dist.all_gather(parts, x.contiguous(), group=parallel.tp_group)
    return torch.stack(parts)
