"""Scores of vocabulary-parallel logits, without gradients: target, top-k and best token, KL of two models.

Legend: T tokens, C tokens of a chunk, V columns of this rank's logits, K top-k, R tensor-parallel ranks.
"""

from __future__ import annotations

import torch

from megatron_npd.kernels.objective import check_temperature
from megatron_npd.kernels.vocab_parallel import Shard, chunks, gather
from megatron_npd.parallel import Parallel


def token_logprobs(logits_TV: torch.Tensor, targets_T: torch.Tensor, parallel: Parallel, valid: int) -> torch.Tensor:
    """log softmax(logits)[target], float32 [T]. No gradient."""
    shard = Shard.of(logits_TV.shape[1], parallel, valid)
    partial_2T = _floats(logits_TV, 2, len(logits_TV))
    for rows, z_CV in chunks(logits_TV, shard):
        partial_2T[0, rows] = torch.logsumexp(z_CV, -1)
        partial_2T[1, rows] = shard.read(logits_TV[rows], targets_T[rows, None]).sum(-1)
    lse_RT, target_RT = gather(partial_2T, parallel).unbind(1)
    return target_RT.sum(0) - torch.logsumexp(lse_RT, 0)


def topk_logprobs(
    logits_TV: torch.Tensor, k: int, parallel: Parallel, valid: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most probable ids of softmax(logits / temperature), their log-probabilities and the mass outside them.

    Only each rank's own k best travel, never the vocabulary. No gradient.

    Returns:
        int64 [T, K], float32 [T, K] (descending), float32 [T]. The mass is computed from the tail itself, not as
        1 - sum.

    Raises:
        ValueError: the temperature is not a positive finite number.
    """
    check_temperature(temperature)
    shard, tokens = Shard.of(logits_TV.shape[1], parallel, valid), len(logits_TV)
    # A shard may hold fewer than k tokens: the rest of its places stays impossible.
    own, lse_T, tail_T = min(k, valid), _floats(logits_TV, tokens), _floats(logits_TV, tokens)
    values_TK = _floats(logits_TV, tokens, k).fill_(-torch.inf)
    columns_TK = torch.zeros_like(values_TK, dtype=torch.int64)
    for rows, z_CV in chunks(logits_TV, shard, temperature):
        values_TK[rows, :own], columns_TK[rows, :own] = z_CV.topk(own, -1)
        lse_T[rows] = torch.logsumexp(z_CV, -1)
    value_RTK = gather(values_TK, parallel)
    id_RTK = gather(columns_TK + shard.first, parallel)
    lse_T = torch.logsumexp(gather(lse_T, parallel), 0)
    best_TK, choice_TK = value_RTK.permute(1, 0, 2).flatten(1).topk(k, -1)
    ids_TK = id_RTK.permute(1, 0, 2).flatten(1).gather(1, choice_TK)
    for rows, z_CV in chunks(logits_TV, shard, temperature):
        tail_T[rows] = shard.logsumexp_without(z_CV, ids_TK[rows])
    tail_T = torch.logsumexp(gather(tail_T, parallel), 0)
    return ids_TK, best_TK - lse_T[:, None], torch.exp(tail_T - lse_T)


def top_token(logits_TV: torch.Tensor, parallel: Parallel, valid: int) -> torch.Tensor:
    """The most probable id, int64 [T]; the lowest of equals."""
    shard = Shard.of(logits_TV.shape[1], parallel, valid)
    value_T = _floats(logits_TV, len(logits_TV)).fill_(-torch.inf)
    id_T = torch.zeros_like(value_T, dtype=torch.int64)
    if valid:  # a rank of padding alone has no best
        for rows, z_CV in chunks(logits_TV, shard):
            value_T[rows], id_T[rows] = z_CV.max(-1)
    value_RT, id_RT = gather(value_T, parallel), gather(id_T + shard.first, parallel)
    return id_RT.gather(0, value_RT.argmax(0, keepdim=True))[0]


def forward_kl(teacher_TV: torch.Tensor, student_TV: torch.Tensor, parallel: Parallel, valid: int) -> torch.Tensor:
    """KL(teacher || student) over the whole vocabulary, float32 [T], nats. No gradient."""
    shard = Shard.of(teacher_TV.shape[1], parallel, valid)
    lse_2T = _floats(teacher_TV, 2, len(teacher_TV))
    for (rows, p_CV), (_, q_CV) in zip(chunks(teacher_TV, shard), chunks(student_TV, shard), strict=True):
        lse_2T[0, rows], lse_2T[1, rows] = torch.logsumexp(p_CV, -1), torch.logsumexp(q_CV, -1)
    lse_p_T, lse_q_T = torch.logsumexp(gather(lse_2T, parallel), 0)
    kl_T = _floats(teacher_TV, len(teacher_TV))
    for (rows, p_CV), (_, q_CV) in zip(chunks(teacher_TV, shard), chunks(student_TV, shard), strict=True):
        log_p_CV, log_q_CV = p_CV - lse_p_T[rows, None], q_CV - lse_q_T[rows, None]
        # A token the teacher excludes (-inf) contributes 0, not NaN.
        kl_T[rows] = torch.where(log_p_CV > -torch.inf, log_p_CV.exp() * (log_p_CV - log_q_CV), 0.0).sum(-1)
    return gather(kl_T, parallel).sum(0)


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised float32 on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
