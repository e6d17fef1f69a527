"""How often something that waits looks."""

from __future__ import annotations

import pytest

from megatron_npd.process import waiting
from megatron_npd.process.waiting import SHORTEST_PAUSE_SECONDS, Pace, wait_for


def test_looks_follow_each_other_quickly_at_first_and_then_as_seldom_as_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(waiting.time, "sleep", pauses.append)
    looks = iter([*[None] * 30, "there"])
    assert wait_for("it", lambda: next(looks), poll_seconds=0.2) == "there"
    assert pauses[0] == SHORTEST_PAUSE_SECONDS and len(pauses) == 30
    assert pauses[-5:] == [0.2] * 5 and max(pauses) == 0.2
    waited = 0.0
    for pause in pauses:
        assert pause <= waited / 3 + SHORTEST_PAUSE_SECONDS + 1e-9, (
            "what is there by then is noticed a third too late at most"
        )
        waited += pause


@pytest.mark.parametrize("longest", [0.001, 10.0])
def test_a_pause_is_never_longer_than_asked(longest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(waiting.time, "sleep", pauses.append)
    pace = Pace(longest)
    for _ in range(40):
        pace.sleep(most=1.0)
    assert max(pauses) == min(longest, 1.0)
