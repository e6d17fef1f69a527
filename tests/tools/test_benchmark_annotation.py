"""What the annotation's benchmark calls rounding, and what it does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from places import TOOLS

pytestmark = pytest.mark.heavy  # starts processes

TOOL = TOOLS / "benchmark_annotation.py"
TAU = 0.8


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_annotation", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_verdict_may_differ_within_rounding_of_a_border(tool: ModuleType) -> None:
    exact = np.array([0.3, 0.001, 0.799, 1.2, 0.5])
    four = exact + np.array([0.002, 0.0, 0.0, 0.0, -0.001])  # rounding: 0.002
    three = exact + np.array([0.0, -0.002, 0.0015, 0.003, 0.0])
    figures = tool.compare(three, four, exact, TAU)
    assert figures["verdicts_that_differ"] == 2 and figures["unexplained"] == 0
    assert figures["within_rounding_of_a_border"] == 2
    assert figures["from_float64"]["three_passes"]["max"] == pytest.approx(0.003)
    assert figures["from_float64"]["four_passes"]["max"] == pytest.approx(0.002)


def test_a_wrong_logprob_is_no_rounding(tool: ModuleType) -> None:
    exact = np.array([0.3, 0.4, 0.5])
    figures = tool.compare(exact - np.array([0.0, 0.41, 0.0]), exact + 1e-3, exact, TAU)
    assert figures["verdicts_that_differ"] == figures["unexplained"] == 1


def test_no_run_directory_is_one_line(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path)])
    assert tool.main() == 2
    said = capsys.readouterr().err
    assert said == f"benchmark_annotation: error: {tmp_path}: no config.toml in it; must be a run directory\n"
