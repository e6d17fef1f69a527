"""A random drop of the size of another rule's: what says whether that rule does more than to train on fewer samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from megatron_npd.schema import Verdict
from megatron_npd.selection.delta_ifd import DeltaIfd
from megatron_npd.selection.rule import Judgement, Nlls, Responses


@dataclass(frozen=True)
class RandomDrop:
    """Keeps as many of a unit's usable responses as `like` would, those with the lowest lots."""

    looks_at_scores: ClassVar[bool] = True
    like: DeltaIfd

    def needs_no_score(self, responses: Responses) -> np.ndarray:
        return self.like.needs_no_score(responses)

    def judge(self, responses: Responses, nlls: Nlls) -> Judgement:
        judged = self.like.judge(responses, nlls)
        return replace(judged, verdict=self._drawn(judged.verdict, responses.lots))

    def _drawn(self, verdict: np.ndarray, lots: np.ndarray) -> np.ndarray:
        """Verdicts with the filter's own replaced by lot; uint8 [N]."""
        usable = np.flatnonzero(np.isin(verdict, [Verdict.KEPT, Verdict.DEGENERATE, Verdict.COGNITIVE_DISCONNECT]))
        kept = usable[np.argsort(lots[usable], kind="stable")[: np.count_nonzero(verdict == Verdict.KEPT)]]
        drawn = verdict.copy()
        drawn[usable] = Verdict.RANDOM
        drawn[kept] = Verdict.KEPT
        return drawn

    def describe(self) -> dict[str, Any]:
        like = self.like.describe()
        return {"rule": "random", "like": like, "keeps": f"at random as many as {like['keeps']} would be", "band": None}
