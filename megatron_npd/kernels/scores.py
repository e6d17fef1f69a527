"""Scores of vocabulary-parallel logits, without gradients: target, top-k and best token, KL of two models.

Legend: T tokens, C tokens of a chunk, V columns of this rank's logits, K top-k, R tensor-parallel ranks,
M = R·K candidates where the ranks' best meet.
"""

from __future__ import annotations

import torch

from megatron_npd.distributed.collectives import over_tensor_ranks
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.kernels import native
from megatron_npd.kernels.objective import check_temperature
from megatron_npd.kernels.vocab_parallel import VocabShard, chunks


def token_logprobs(logits_TV: torch.Tensor, targets_T: torch.Tensor, parallel: Parallel, valid: int) -> torch.Tensor:
    """log softmax(logits)[target], float32 [T]. No gradient."""
    shard = VocabShard.of(logits_TV.shape[1], parallel, valid)
    max_RT, sum_RT, target_RT = over_tensor_ranks(_score(logits_TV, targets_T, shard), parallel).unbind(1)
    base_T = _finite(max_RT.amax(0))
    sum_T = (sum_RT * torch.exp(max_RT - base_T)).sum(0)
    return (target_RT.sum(0) - base_T) - sum_T.log()


def topk_logprobs(
    logits_TV: torch.Tensor, k: int, parallel: Parallel, valid: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most probable ids of softmax(logits / temperature), their log-probabilities and the mass outside them.

    Only each rank's own k best travel, never the vocabulary. No gradient.

    Returns:
        int64 [T, K], float32 [T, K] (descending; the lowest id first among equals), float32 [T]. The mass is computed
        from the tail itself, not as 1 - sum.

    Raises:
        ValueError: the temperature is not a positive finite number.
    """
    check_temperature(temperature)
    shard = VocabShard.of(logits_TV.shape[1], parallel, valid)
    value_RTK, id_RTK, rest_R2T = (over_tensor_ranks(x, parallel) for x in _best(logits_TV, k, shard, temperature))
    max_RT, rest_RT = rest_R2T.unbind(1)
    # Stable, and ranks hold ascending ids: the lowest id first among equals.
    candidates_TM, choice_TM = value_RTK.permute(1, 0, 2).flatten(1).sort(dim=-1, descending=True, stable=True)
    base_T = _finite(torch.cat([max_RT.T, candidates_TM], 1).amax(-1))
    ids_TK = id_RTK.permute(1, 0, 2).flatten(1).gather(1, choice_TM[:, :k])
    scaled_TM = (candidates_TM - base_T[:, None]) / temperature
    inside_T, left_out_T = (part.exp().sum(-1) for part in scaled_TM.split([k, scaled_TM.shape[1] - k], -1))
    # Outside the k best of all ranks: what each rank left out, and what the others' candidates pushed out.
    tail_T = (rest_RT * torch.exp((max_RT - base_T) / temperature)).sum(0) + left_out_T
    sum_T = inside_T + tail_T
    return ids_TK, scaled_TM[:, :k] - sum_T.log()[:, None], tail_T / sum_T


def top_token(logits_TV: torch.Tensor, parallel: Parallel, valid: int) -> torch.Tensor:
    """The most probable id, int64 [T]; the lowest of equals."""
    shard = VocabShard.of(logits_TV.shape[1], parallel, valid)
    value_T = _floats(logits_TV, len(logits_TV)).fill_(-torch.inf)
    id_T = torch.zeros_like(value_T, dtype=torch.int64)
    if valid:  # a rank of padding alone has no best
        for rows, z_CV in chunks(logits_TV, shard):
            value_T[rows], id_T[rows] = z_CV.max(-1)
    value_RT, id_RT = over_tensor_ranks(value_T, parallel), over_tensor_ranks(id_T + shard.first, parallel)
    return id_RT.gather(0, value_RT.argmax(0, keepdim=True))[0]


def forward_kl(teacher_TV: torch.Tensor, student_TV: torch.Tensor, parallel: Parallel, valid: int) -> torch.Tensor:
    """KL(teacher || student) over the whole vocabulary, float32 [T], nats. No gradient."""
    shard = VocabShard.of(teacher_TV.shape[1], parallel, valid)
    lse_2T = _floats(teacher_TV, 2, len(teacher_TV))
    for (rows, p_CV), (_, q_CV) in zip(chunks(teacher_TV, shard), chunks(student_TV, shard), strict=True):
        lse_2T[0, rows], lse_2T[1, rows] = torch.logsumexp(p_CV, -1), torch.logsumexp(q_CV, -1)
    lse_p_T, lse_q_T = torch.logsumexp(over_tensor_ranks(lse_2T, parallel), 0)
    kl_T = _floats(teacher_TV, len(teacher_TV))
    for (rows, p_CV), (_, q_CV) in zip(chunks(teacher_TV, shard), chunks(student_TV, shard), strict=True):
        log_p_CV, log_q_CV = p_CV - lse_p_T[rows, None], q_CV - lse_q_T[rows, None]
        # A token the teacher excludes (-inf) contributes 0, not NaN.
        kl_T[rows] = torch.where(log_p_CV > -torch.inf, log_p_CV.exp() * (log_p_CV - log_q_CV), 0.0).sum(-1)
    return over_tensor_ranks(kl_T, parallel).sum(0)


def _score(logits_TV: torch.Tensor, targets_T: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """What this rank's columns contribute: a base b, Σ exp(z - b) and the target's logit, float32 [3, T]."""
    if native.runs(logits_TV):
        return native.score(logits_TV, targets_T, shard.first, shard.valid)
    partial_3T = _floats(logits_TV, 3, len(logits_TV))
    partial_3T[1] = 1.0  # a base of logsumexp(z) has this sum
    for rows, z_CV in chunks(logits_TV, shard):
        partial_3T[0, rows] = torch.logsumexp(z_CV, -1)
        partial_3T[2, rows] = shard.read(logits_TV[rows], targets_T[rows, None]).sum(-1)
    return partial_3T


def _best(
    logits_TV: torch.Tensor, k: int, shard: VocabShard, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's k best logits and ids, [T, K], and of its other columns a base b and Σ exp((z - b) / τ), [2, T].

    A rank may have fewer than k columns: the rest of the places is -inf.
    """
    if native.runs(logits_TV, k, native.MOST_TOPK):
        return native.topk(logits_TV, k, shard.first, shard.valid, temperature)
    own, tokens = min(k, shard.valid), len(logits_TV)
    values_TK = _floats(logits_TV, tokens, k).fill_(-torch.inf)
    columns_TK = torch.zeros_like(values_TK, dtype=torch.int64)
    rest_2T = _floats(logits_TV, 2, tokens)
    rest_2T[1] = 1.0  # a base of τ·logsumexp(z / τ) has this sum
    for rows, z_CV in chunks(logits_TV, shard):
        values_TK[rows, :own], columns_TK[rows, :own] = z_CV.topk(own, -1)
        ids_CK = columns_TK[rows, :own] + shard.first
        rest_2T[0, rows] = temperature * shard.logsumexp_without(z_CV.div_(temperature), ids_CK)
    return values_TK, columns_TK + shard.first, rest_2T


def _finite(max_T: torch.Tensor) -> torch.Tensor:
    """0 for a maximum of -inf, that of no column at all, so that differences from it are no NaN."""
    return torch.where(max_T == -torch.inf, 0.0, max_T)


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised float32 on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
