"""The public surface changes on purpose only: `python tests/support/public_surface.py` writes the frozen list anew."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from public_surface import FROZEN, light_surface, summary_surface


def differences(now: Iterable[str], of_summary: bool) -> list[str]:
    """Lines that came (+) and went (-) since the list was written."""
    frozen = FROZEN.read_text(encoding="utf-8").splitlines()
    before, now = {line for line in frozen if line.startswith("summary: ") == of_summary}, set(now)
    return [*(f"+ {line}" for line in sorted(now - before)), *(f"- {line}" for line in sorted(before - now))]


def test_keys_commands_and_metrics_are_as_written_down() -> None:
    assert differences(light_surface(), of_summary=False) == []


@pytest.mark.heavy
def test_keys_of_the_summary_are_as_written_down(tmp_path: Path) -> None:
    assert differences(summary_surface(tmp_path), of_summary=True) == []


def test_a_change_is_seen() -> None:
    changed = [line.replace("selection.tau =", "selection.threshold =") for line in light_surface()]
    assert differences(changed, of_summary=False) == ["+ key: selection.threshold = 0.8", "- key: selection.tau = 0.8"]
