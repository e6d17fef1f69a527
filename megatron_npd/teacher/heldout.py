"""Held-out figures of a published version: exact forward KL on one fixed set of teacher responses.

The teacher is the same for every version, so it reads the set once. What is kept of that are its last hidden states,
one vector a response token in the compute dtype, in this host's memory: projected to the vocabulary again they give the
same logits bit for bit, at a fraction of the cost of its layers and of the room that logits would take.

Legend: N response tokens of a pack, C tokens of a chunk, V columns of this rank's logits, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_npd.data.packing import pack
from megatron_npd.kernels import forward_kl, token_logprobs, top_token
from megatron_npd.process import activity
from megatron_npd.teacher.prefill import PrefillModel, response_tokens
from megatron_npd.teacher.scorer import Pair


@dataclass(frozen=True)
class HeldoutFigures:
    """Means over the response tokens; KL(teacher || student) over the whole vocabulary, nats a token.

    The vocabulary is what both models have: where one has padding rows besides, or the teacher tokens of its own, both
    distributions are renormalised over the common ids.
    """

    heldout_kl: float
    heldout_ce: float
    top1_agreement: float
    tokens: int


class HeldoutSet:
    """The held-out pairs, packed, and the teacher's hidden states of them."""

    def __init__(self, teacher: PrefillModel, pairs: list[Pair], pack_length: int, most_bytes: float):
        """`most_bytes`: host memory for hidden states; packs beyond it are read by the teacher for every version."""
        lengths = np.array([len(prefix) + len(response) - 1 for prefix, response in pairs])
        self._teacher = teacher
        self._packs = [[pairs[item] for item in items] for items in pack(lengths, pack_length)]
        self._hidden: dict[int, torch.Tensor] = {}
        self._left = most_bytes

    @property
    def kept_packs(self) -> int:
        """Packs whose teacher's hidden states are in memory."""
        return len(self._hidden)

    def __len__(self) -> int:
        """Number of packs."""
        return len(self._packs)

    def evaluate(self, student: PrefillModel) -> HeldoutFigures:
        """Compare a student with the teacher. Every rank gets the same figures."""
        kl = ce = agreement = 0.0
        tokens = 0
        parallel, valid = student.parallel, student.valid
        for number, group in enumerate(self._packs):
            activity.progress()
            targets_N = response_tokens(group).to(parallel.device)
            teacher_chunks = self._teacher.project(self._teacher_hidden(number))
            for (rows, teacher_CV), (_, student_CV) in zip(teacher_chunks, student.logits(group), strict=True):
                kl += forward_kl(teacher_CV, student_CV, parallel, valid).double().sum().item()
                ce -= token_logprobs(student_CV, targets_N[rows], parallel, valid).double().sum().item()
                same_C = top_token(teacher_CV, parallel, valid) == top_token(student_CV, parallel, valid)
                agreement += same_C.double().sum().item()
            tokens += len(targets_N)
        return HeldoutFigures(kl / tokens, ce / tokens, agreement / tokens, tokens)

    def _teacher_hidden(self, number: int) -> torch.Tensor:
        """The teacher's hidden states of a pack, [N, H] on its device."""
        if number in self._hidden:
            return self._hidden[number].to(self._teacher.parallel.device)
        hidden_NH = self._teacher.hidden(self._packs[number])
        if hidden_NH.nbytes <= self._left:
            self._left -= hidden_NH.nbytes
            self._hidden[number] = hidden_NH.cpu()
        return hidden_NH
