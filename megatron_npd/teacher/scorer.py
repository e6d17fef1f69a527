"""What the annotator needs of a model that scores: log-likelihoods of responses, and the likeliest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]
"""Token ids before a response, and the response's: int32 [P], int32 [R]."""


@dataclass(frozen=True)
class Annotation:
    """A model's top-k at every token of one response of R tokens."""

    ids: np.ndarray
    """int32 [R, K], of the ids that both models have."""
    logprobs: np.ndarray
    """float32 [R, K], nats, of the model's full softmax, over what it has besides as well."""
    tail_mass: np.ndarray
    """float32 [R], 1 - the sum of the K probabilities."""


class Scorer(Protocol):
    """A model with the weights of one version."""

    def mean_nll(self, pairs: list[Pair], pack_length: int) -> np.ndarray:
        """Mean negative log-likelihood of each response, nats a token, float64 [len(pairs)]; NaN for an empty one.

        `pack_length`: positions that are computed together at most, where that is up to the caller.
        """

    def annotate(
        self, pairs: list[Pair], pack_length: int, k: int, temperature: float = 1.0
    ) -> tuple[np.ndarray, list[Annotation | None]]:
        """`mean_nll` (at temperature 1) and the top-k of softmax(logits / temperature) at every response token; None
        for an empty response."""
