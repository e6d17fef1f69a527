"""What a selection rule is: it looks at scored responses and says of each whether it is trained on.

A rule judges unit by unit, as responses arrive, and the teacher's top-k is stored for kept samples alone: so a rule may
know of finished stages only, never change a verdict, and must say in `describe` everything it used. That is stored with
what it judged, and readers go by it, not by the configuration of today.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Responses:
    """What is known of N responses before any model scores them."""

    lengths: np.ndarray
    """int [N], tokens of content: the end token does not count."""
    finish_reasons: np.ndarray
    """uint8 [N], `schema.FinishReason`."""
    out_of_vocabulary: np.ndarray
    """bool [N], whether an id is unknown to one of the models."""
    lots: np.ndarray
    """uint64 [N], a number for each sample, drawn from the run's seed and the sample's identity: for rules that leave
    something to chance."""
    by_teacher: bool = False
    """The teacher's own or given ones: no student scores them, and no unconditional pass is made: NaN."""


@dataclass(frozen=True)
class Nlls:
    """Mean NLL of N responses' tokens, nats a token, float64 [N] each; NaN where a response was not scored."""

    teacher_conditional: np.ndarray
    """-log p(response | prompt) under the teacher."""
    teacher_unconditional: np.ndarray
    student_conditional: np.ndarray
    student_unconditional: np.ndarray


@dataclass(frozen=True)
class Judgement:
    """Scores and verdicts of N samples, in the order they were given."""

    ifd_teacher: np.ndarray
    """float64 [N]; NaN or infinite where it is undefined, never replaced by a number."""
    ifd_student: np.ndarray
    """float64 [N], the same."""
    delta_ifd: np.ndarray
    """float64 [N], ifd_teacher - ifd_student."""
    verdict: np.ndarray
    """uint8 [N], `schema.Verdict`."""


class SelectionRule(Protocol):
    """Decides what enters the rollout buffer as training data."""

    looks_at_scores: bool
    """False: it judges without Δ-IFD, so no unconditional pass is made and the student scores nothing: those NLLs are
    NaN."""

    def needs_no_score(self, responses: Responses) -> np.ndarray:
        """bool [N]: rejected whatever its scores would be, so it is not prefilled."""

    def judge(self, responses: Responses, nlls: Nlls) -> Judgement:
        """Score N samples and say of each whether it is trained on. A function of its arguments alone."""

    def describe(self) -> dict[str, Any]:
        """JSON: the rule's name as `rule`, its parameters, and for readers

        - `keeps`: what it keeps, in a few words;
        - `band`: [lowest, highest] Δ-IFD that it keeps, both included, or None where no band says it.
        """
