"""Held-out figures of a published version: exact forward KL on one fixed set of teacher responses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_npd.data.packing import pack
from megatron_npd.kernels import forward_kl, token_logprobs, top_token
from megatron_npd.teacher.prefill import Pair, PrefillModel, response_tokens


@dataclass(frozen=True)
class HeldoutFigures:
    """Means over the response tokens; KL(teacher || student) over the whole vocabulary, nats a token."""

    heldout_kl: float
    heldout_ce: float
    top1_agreement: float
    tokens: int


def evaluate_heldout(
    teacher: PrefillModel, student: PrefillModel, pairs: list[Pair], pack_length: int
) -> HeldoutFigures:
    """Run both models over the same packs. Every rank gets the same figures."""
    kl = ce = agreement = 0.0
    tokens = 0
    parallel, valid = student.parallel, student.valid
    lengths = np.array([len(prefix) + len(response) - 1 for prefix, response in pairs])
    for items in pack(lengths, pack_length):
        group = [pairs[item] for item in items]
        targets = response_tokens(group).to(parallel.device)
        for (rows, teacher_CV), (_, student_CV) in zip(teacher.logits(group), student.logits(group), strict=True):
            kl += forward_kl(teacher_CV, student_CV, parallel, valid).double().sum().item()
            ce -= token_logprobs(student_CV, targets[rows], parallel, valid).double().sum().item()
            same = top_token(teacher_CV, parallel, valid) == top_token(student_CV, parallel, valid)
            agreement += same.double().sum().item()
        tokens += len(targets)
    return HeldoutFigures(kl / tokens, ce / tokens, agreement / tokens, tokens)
