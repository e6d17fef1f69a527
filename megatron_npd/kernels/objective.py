"""The distillation objective on vocabulary-parallel logits, in four steps that its entries call in this order.

    partial_statistics -> gather -> merge_statistics -> token_losses -> write_gradient

The first and the last pass over logits; between them only four floats a token travel (five at a temperature other than
1). Everything is computed in float32 over chunks, so no [T, V] float32 temporary exists, and a gradient entry is
rounded to the logits' dtype once.

With y the sampled token, p the teacher on its top-k ids S and q = softmax(z / τ) the student, both at temperature τ,
P = Σ_S p and Q = Σ_S q, the loss is (1 - λ)·CE + λ·τ²·KD with CE at temperature 1 and KD for each `tail`

    none          Σ_S p log(p / q)                                            can be negative, never clamped
    bucket        Σ_S p log(p / q) + (1 - P) log((1 - P) / (1 - Q))           >= 0
    renormalize   KL of p / P against q / Q on S                              >= 0

Sources: Near-Policy Distillation, arXiv 2605.05940, for (1 - λ)·CE + λ·KD on the top-k; Hinton et al. 2015,
arXiv 1503.02531, for τ²: gradients of KD scale as 1 / τ², and λ keeps its meaning when τ changes.

Legend: T tokens, C tokens of a chunk, V columns of this rank's logits, K the teacher's top-k, R tensor-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_npd.kernels import native
from megatron_npd.kernels.vocab_parallel import VocabShard, chunks

TAILS = ("none", "bucket", "renormalize")


@dataclass(frozen=True)
class Objective:
    """The settings above: λ, the tail's treatment and τ.

    Raises:
        ValueError: unknown `tail`, or a temperature that is not a positive finite number.
    """

    kd_lambda: float
    tail: str
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise ValueError(f"tail = {self.tail!r}: must be none, bucket or renormalize")
        check_temperature(self.temperature)


@dataclass(frozen=True)
class Labels:
    """What the logits of T tokens are compared with.

    targets_T: sampled tokens, int64, in the vocabulary. ids_TK: S, int64, unique in each row. logprobs_TK: log p on S
    at the objective's temperature, nats, float32. tail_mass_T: 1 - P, float32.
    """

    targets_T: torch.Tensor
    ids_TK: torch.Tensor
    logprobs_TK: torch.Tensor
    tail_mass_T: torch.Tensor

    def __getitem__(self, rows: slice) -> Labels:
        return Labels(self.targets_T[rows], self.ids_TK[rows], self.logprobs_TK[rows], self.tail_mass_T[rows])

    @property
    def p_TK(self) -> torch.Tensor:
        """The teacher's probabilities on S, float32."""
        return self.logprobs_TK.float().exp()

    def check(self) -> None:
        """Raise ValueError where an id is twice in a row."""
        ordered_TK = self.ids_TK.sort(-1).values
        if bool((ordered_TK[:, 1:] == ordered_TK[:, :-1]).any()):
            raise ValueError("topk_ids_TK: ids must be unique in each row")


@dataclass(frozen=True)
class Statistics:
    """What losses and gradients need to know of a token's whole row of logits z, over all ranks; float32 [T]."""

    target_T: torch.Tensor
    """z of the target."""
    lse_one_T: torch.Tensor
    """log Σ exp z."""
    lse_T: torch.Tensor
    """log Σ exp(z / τ)."""
    lse_S_T: torch.Tensor
    """The same over S."""
    lse_tail_T: torch.Tensor
    """The same over everything outside S; -inf where that is nothing."""
    pz_T: torch.Tensor
    """Σ_S p·z / τ."""


@dataclass(frozen=True)
class TokenLosses:
    """Losses of T tokens, float32 [T], nats: loss = (1 - λ)·ce + λ·kd, where kd includes τ²."""

    loss: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is a positive finite number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature!r}: must be a positive finite number")


def partial_statistics(
    logits_TV: torch.Tensor, labels: Labels, objective: Objective, shard: VocabShard
) -> torch.Tensor:
    """What this rank's columns contribute: float32 [4, T], or [5, T] at a temperature other than 1.

    Rows: logsumexp(z / τ) over S and outside it, Σ_S p·z / τ, z of the target, and logsumexp(z) where τ is not 1 (at
    τ = 1 the first two give it).
    """
    temperature, p_TK = objective.temperature, labels.p_TK
    if native.runs(logits_TV, p_TK.shape[1], native.MOST_LOSS_IDS):
        given = (logits_TV, labels.targets_T, labels.ids_TK, p_TK, shard.first, shard.valid)
        return native.loss_statistics(*given, temperature)
    rows_of_partial = 4 if temperature == 1 else 5
    partial = torch.empty(rows_of_partial, len(logits_TV), dtype=torch.float32, device=logits_TV.device)
    for rows, z_CV in chunks(logits_TV, shard):
        ids_CK = labels.ids_TK[rows]
        z_S_CK = shard.read(logits_TV[rows], ids_CK) / temperature
        if temperature != 1:
            partial[4, rows] = torch.logsumexp(z_CV, -1)
            z_CV.div_(temperature)
        partial[0, rows] = torch.logsumexp(z_S_CK.masked_fill(~shard.owns(ids_CK), -torch.inf), -1)
        partial[1, rows] = shard.logsumexp_without(z_CV, ids_CK)  # overwrites z_CV
        partial[2, rows] = (p_TK[rows] * z_S_CK).sum(-1)
        partial[3, rows] = shard.read(logits_TV[rows], labels.targets_T[rows, None]).sum(-1)
    return partial


def merge_statistics(partials_R: torch.Tensor) -> Statistics:
    """The statistics of the whole vocabulary from every rank's `partial_statistics`, [R, 4 or 5, T]."""
    inside_RT, outside_RT, pz_RT, target_RT, *one_RT = partials_R.unbind(1)
    lse_S_T, lse_tail_T = torch.logsumexp(inside_RT, 0), torch.logsumexp(outside_RT, 0)
    lse_T = torch.logaddexp(lse_S_T, lse_tail_T)
    lse_one_T = torch.logsumexp(one_RT[0], 0) if one_RT else lse_T
    return Statistics(target_RT.sum(0), lse_one_T, lse_T, lse_S_T, lse_tail_T, pz_RT.sum(0))


def token_losses(statistics: Statistics, labels: Labels, objective: Objective) -> TokenLosses:
    """The objective per token."""
    s, p_TK, tail_mass_T = statistics, labels.p_TK, labels.tail_mass_T
    mass_T = p_TK.sum(-1)
    ce_T = s.lse_one_T - s.target_T
    # Σ_S p log p - Σ_S p·z / τ is common to all three; what it is normalised by differs.
    kd_T = (p_TK * labels.logprobs_TK).sum(-1) - s.pz_T
    if objective.tail == "renormalize":
        kd_T = (kd_T + mass_T * s.lse_S_T) / mass_T - mass_T.log()
    else:
        kd_T = kd_T + mass_T * s.lse_T
    if objective.tail == "bucket":
        log_tail_mass_T = tail_mass_T.clamp_min(torch.finfo(torch.float32).tiny).log()
        log_ratio_T = log_tail_mass_T - (s.lse_tail_T - s.lse_T)
        kd_T = kd_T + torch.where(tail_mass_T > 0, tail_mass_T * log_ratio_T, 0.0)
    kd_T = objective.temperature**2 * kd_T
    if objective.kd_lambda == 0:  # CE alone, also where the KD is infinite: 0 times that would be NaN
        return TokenLosses(ce_T.clone(), ce_T, kd_T)  # the first has a gradient, the second has none
    return TokenLosses((1 - objective.kd_lambda) * ce_T + objective.kd_lambda * kd_T, ce_T, kd_T)


def write_gradient(
    logits_TV: torch.Tensor,
    into_TV: torch.Tensor,
    grad_T: torch.Tensor,
    statistics: Statistics,
    labels: Labels,
    objective: Objective,
    shard: VocabShard,
) -> None:
    """Write ∂(Σ grad·loss)/∂logits of this rank's columns to `into_TV`, which may be `logits_TV` itself.

    On S the gradient is recomputed in float32 from z, not corrected after rounding. Padding columns get 0.
    """
    p_TK, temperature = labels.p_TK, objective.temperature
    coefficients_8T = _gradient_coefficients(grad_T, statistics, labels, objective)
    if native.runs(into_TV, p_TK.shape[1], native.MOST_LOSS_IDS):
        if into_TV is not logits_TV:
            into_TV.copy_(logits_TV)
        given = (into_TV, labels.targets_T, labels.ids_TK, p_TK, coefficients_8T, shard.first, shard.valid)
        native.loss_gradient_(*given, temperature)
        return
    for rows, z_CV in chunks(logits_TV, shard):
        tail_factor_C1, lse_tail_C1, ce_C1, lse_one_C1, student_C1, normaliser_C1, teacher_C1, target_C1 = (
            coefficients_8T[:, rows, None]
        )
        ids_CK = labels.ids_TK[rows]
        z_S_CK = shard.read(logits_TV[rows], ids_CK)
        inside_CK = student_C1 * torch.exp(z_S_CK / temperature - normaliser_C1) - teacher_C1 * p_TK[rows]
        inside_CK += ce_C1 * torch.exp(z_S_CK - lse_one_C1)
        if temperature == 1:
            chunk_CV = z_CV.sub_(lse_tail_C1).exp_().mul_(tail_factor_C1)
        else:
            kd_CV = (z_CV / temperature).sub_(lse_tail_C1).exp_().mul_(tail_factor_C1)
            chunk_CV = z_CV.sub_(lse_one_C1).exp_().mul_(ce_C1).add_(kd_CV)
        shard.overwrite(chunk_CV, ids_CK, inside_CK)
        shard.add(chunk_CV, labels.targets_T[rows, None], -target_C1)
        into_TV[rows, : shard.valid] = chunk_CV
    into_TV[:, shard.valid :] = 0


def _gradient_coefficients(
    grad_T: torch.Tensor, statistics: Statistics, labels: Labels, objective: Objective
) -> torch.Tensor:
    """All that the gradient of a token's logits needs besides the logits, float32 [8, T].

    Rows, in the order of csrc/cpu/loss.h: tail_factor, lse_tail, ce, lse_one, student, normaliser, teacher, target.
    The gradient is

        outside S   tail_factor·exp(z / τ - lse_tail), and at τ other than 1 plus ce·exp(z - lse_one)
        on S        student·exp(z / τ - normaliser) - teacher·p + ce·exp(z - lse_one)

    and at the target, in S or not, `target` less.
    """
    s, temperature = statistics, objective.temperature
    normaliser_T, student_T, teacher_T, outside_T = _kd_coefficients(statistics, labels, objective)
    ce_T = (1 - objective.kd_lambda) * grad_T
    kd_T = objective.kd_lambda * temperature * grad_T  # τ² of the objective, 1 / τ of ∂(z / τ)/∂z
    # With no tail at all its softmax is nowhere used, but must not be NaN.
    lse_tail_T = torch.where(s.lse_tail_T == -torch.inf, s.lse_T, s.lse_tail_T)
    tail_factor_T = kd_T * outside_T
    if temperature == 1:  # CE's softmax is KD's: q_j = (1 - Q)·exp(z_j - lse_tail), and one exp a column does
        tail_factor_T = tail_factor_T + ce_T * torch.exp(lse_tail_T - s.lse_T)
    rows = (tail_factor_T, lse_tail_T, ce_T, s.lse_one_T, kd_T * student_T, normaliser_T, kd_T * teacher_T, ce_T)
    return torch.stack([row_T.float() for row_T in rows])


def _kd_coefficients(
    statistics: Statistics, labels: Labels, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """∂KD/∂(z / τ) as four numbers a token, float32 [T]: normaliser, student, teacher, outside.

    On S it is student·exp(z_j / τ - normaliser) - teacher·p_j, elsewhere outside·exp(z_j / τ - lse_tail): a multiple of
    the tail's own softmax, which is stable however little mass the student leaves there.
    """
    s = statistics
    one_T = torch.ones_like(s.lse_T)
    tail_q_T = torch.exp(s.lse_tail_T - s.lse_T)  # 1 - Q
    if objective.tail == "none":
        mass_T = labels.p_TK.sum(-1)  # P: p sums to it, not to 1, so the gradient is P·q - p
        return s.lse_T, mass_T, one_T, mass_T * tail_q_T
    if objective.tail == "bucket":
        return s.lse_T, one_T, one_T, tail_q_T - labels.tail_mass_T
    return s.lse_S_T, one_T, 1 / labels.p_TK.sum(-1), torch.zeros_like(s.lse_T)
