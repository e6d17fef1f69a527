"""Proof, after every load, that the engine computes what the trainer computes: same tokens, same logprobs.

A checksum proves which bytes were read; only the logprobs prove which weights are multiplied with. The figures also
measure the mismatch between the two engines that is left when all is well (rounding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_npd.buffer.versions import ParityProbe
from megatron_npd.config import RolloutConfig


class ParityError(RuntimeError):
    """The engine's logprobs are not the trainer's."""


class ScoringEngine(Protocol):
    """What the check needs of an engine."""

    version: int

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """log p(token t | tokens before t) for t >= 1, nats."""


@dataclass(frozen=True)
class Parity:
    """|log p(engine) - log p(trainer)| over all tokens of a probe, nats a token."""

    mean: float
    max: float


def check_parity(engine: ScoringEngine, probe: ParityProbe, rollout: RolloutConfig) -> Parity:
    """Compare the engine's logprobs with the trainer's, and return by how much they differ.

    Raises:
        ParityError: beyond `rollout.parity_mean_tolerance` or `rollout.parity_max_tolerance`, not a number, or
            nothing to compare.
    """
    parity = measure_parity(engine.logprobs(probe.sequences), probe.logprobs)
    # Written so that a NaN fails.
    if not (parity.mean <= rollout.parity_mean_tolerance and parity.max <= rollout.parity_max_tolerance):
        raise ParityError(
            f"version {engine.version}: vLLM's logprobs are not the trainer's: mean difference {parity.mean:.4g} nats "
            f"a token (rollout.parity_mean_tolerance = {rollout.parity_mean_tolerance}), largest {parity.max:.4g} "
            f"(rollout.parity_max_tolerance = {rollout.parity_max_tolerance})"
        )
    return parity


def measure_parity(engine: list[list[float]], trainer: list[list[float]]) -> Parity:
    """Mean and largest absolute difference; raises `ParityError` if the lists do not pair up or are empty."""
    lengths = [len(row) for row in engine], [len(row) for row in trainer]
    if lengths[0] != lengths[1] or not sum(lengths[0]):
        raise ParityError(f"parity probe: {lengths[1]} trainer logprobs against {lengths[0]} of the engine")
    difference = np.abs(np.concatenate(engine) - np.concatenate(trainer))
    return Parity(float(difference.mean()), float(difference.max()))
