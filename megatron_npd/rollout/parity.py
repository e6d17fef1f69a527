"""Proof, after every load, that the engine computes what the trainer computes: same tokens, same logprobs.

16-bit logits are rounded relative to their size, and so two right engines differ the more the less likely the tokens
are. Measured on the quickstart in bfloat16: 0.05 to 0.07 nats a token for its trained versions, and 0.25 for the
untouched pruned student, where transformers in bfloat16 differs from itself in float32 by 0.21. Each difference is
therefore taken relative to 1 + the token's negative log-likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_npd.config import RolloutConfig
from megatron_npd.versions.manifest import ParityProbe


class ParityError(RuntimeError):
    """The engine's logprobs are not the trainer's."""


class ScoringEngine(Protocol):
    """What the check needs of an engine."""

    version: int

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """log p(token t | tokens before t) for t >= 1, nats."""


@dataclass(frozen=True)
class Parity:
    """How far an engine's logprobs are from the trainer's, over all tokens of a probe."""

    mean: float
    """Mean |log p(engine) - log p(trainer)|, nats a token."""
    max: float
    """Largest, nats."""
    relative_mean: float
    """Mean of each difference over 1 + the token's negative log-likelihood under the trainer."""
    relative_max: float
    """Largest of those."""


def check_parity(engine: ScoringEngine, probe: ParityProbe, rollout: RolloutConfig) -> Parity:
    """Compare the engine's logprobs with the trainer's, and return by how much they differ.

    Raises:
        ParityError: beyond `rollout.parity_mean_tolerance` or `rollout.parity_max_tolerance`, not a number, or
            nothing to compare.
    """
    parity = measure_parity(engine.logprobs(probe.sequences), probe.logprobs)
    # Written so that a NaN fails.
    if not (
        parity.relative_mean <= rollout.parity_mean_tolerance and parity.relative_max <= rollout.parity_max_tolerance
    ):
        raise ParityError(
            f"version {engine.version}: vLLM's logprobs are not the trainer's: relative mean difference "
            f"{parity.relative_mean:.4g} (rollout.parity_mean_tolerance = {rollout.parity_mean_tolerance}), largest "
            f"{parity.relative_max:.4g} (rollout.parity_max_tolerance = {rollout.parity_max_tolerance}); "
            f"{parity.mean:.4g} nats a token"
        )
    return parity


def measure_parity(engine: list[list[float]], trainer: list[list[float]]) -> Parity:
    """The differences of paired logprobs; raises `ParityError` if the lists do not pair up or are empty."""
    lengths = [len(row) for row in engine], [len(row) for row in trainer]
    if lengths[0] != lengths[1] or not sum(lengths[0]):
        raise ParityError(f"parity probe: {lengths[1]} trainer logprobs against {lengths[0]} of the engine")
    ours = np.concatenate(trainer)
    difference = np.abs(np.concatenate(engine) - ours)
    relative = difference / (1.0 - ours)
    return Parity(*(float(x) for x in (difference.mean(), difference.max(), relative.mean(), relative.max())))
