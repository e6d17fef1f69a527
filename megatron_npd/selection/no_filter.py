"""No filter: every usable response is trained on. What on-policy distillation does, and the cheapest rule there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megatron_npd.selection.delta_ifd import DeltaIfd
from megatron_npd.selection.rule import Judgement, Nlls, Responses


@dataclass(frozen=True)
class NoFilter:
    """Rejects only what cannot be trained on: empty, cut (where asked for), unknown or unscored responses."""

    looks_at_scores: ClassVar[bool] = False
    reject_truncated: bool

    @property
    def _usable(self) -> DeltaIfd:
        return DeltaIfd("ppl", 0.0, self.reject_truncated)

    def needs_no_score(self, responses: Responses) -> np.ndarray:
        return self._usable.needs_no_score(responses)

    def judge(self, responses: Responses, nlls: Nlls) -> Judgement:
        return self._usable.judge(responses, nlls, by_delta=False)

    def describe(self) -> dict[str, Any]:
        return {
            "rule": "none",
            "reject_truncated": self.reject_truncated,
            "keeps": "every usable response",
            "band": None,
        }
