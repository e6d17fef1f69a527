"""The published speed-up from the published device-hours, and the figures of docs/speedup.md."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from places import ROOT, TOOLS

from megatron_npd.estimates.speedup import (
    DEVICES,
    PUBLISHED,
    PUBLISHED_SPEEDUP,
    Engine,
    Lengths,
    Setting,
    batch_of,
    scheduled,
    simulated_hours,
    speedup,
    strict,
)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("simulate_speedup")


def test_the_published_run_is_reproduced(tool: ModuleType) -> None:
    assert PUBLISHED.total == 366
    batch = batch_of(PUBLISHED_SPEEDUP, tool.REFERENCE)
    assert batch == pytest.approx(1495, rel=0.01)
    assert speedup(batch, tool.REFERENCE) == pytest.approx(8.1, rel=1e-3)
    steps = round(tool.REFERENCE.responses / batch)
    near = simulated_hours(PUBLISHED, 2, 5, steps)
    on_policy = simulated_hours(strict(batch, tool.REFERENCE), 10 * steps, 1, 1)
    assert near == pytest.approx(PUBLISHED.total / DEVICES)
    assert on_policy / near == pytest.approx(8.1, rel=1e-3)


def test_reuse_alone_needs_no_model(tool: ModuleType) -> None:
    """Ten sets instead of two: five times the rollouts and the annotation, whatever the lengths."""
    for lengths in (Lengths(50.0, 0.5, 512), Lengths(3000.0, 1.2, 16384)):
        setting = replace(tool.REFERENCE, lengths=lengths)
        fresh = scheduled(10, setting.responses, setting)
        assert (fresh.rollout, fresh.annotation, fresh.training) == pytest.approx((1500, 90, 42))
        assert fresh.total / PUBLISHED.total == pytest.approx(4.475, abs=0.001)
        assert scheduled(2, setting.responses, setting) == PUBLISHED


def test_the_page_says_what_the_tool_says(tool: ModuleType) -> None:
    """Every table line of the tool is in the page."""
    page = (ROOT / "docs" / "speedup.md").read_text()
    text = tool.text(tool.figures())
    lines = [line for line in text.splitlines() if re.match(r"\| [^|]*\d", line)]
    assert len(lines) > 20
    assert [line for line in lines if line not in page] == []
    hours = re.search(r"\(simulated\): ([\d.]+) h against ([\d.]+) h", text)
    assert hours and all(figure in page for figure in hours.groups())


def test_lengths_against_a_sample() -> None:
    lengths = Lengths(median=60.0, sigma=0.9, limit=200)
    generator = np.random.default_rng(0)
    # A response of real length x has ceil(x) tokens, and the limit at most.
    sample = np.minimum(np.ceil(generator.lognormal(np.log(60.0), 0.9, (20_000, 16))), 200)
    assert lengths.mean == pytest.approx(sample.mean(), rel=0.01)
    assert lengths.longest(16) == pytest.approx(sample.max(axis=1).mean(), rel=0.01)
    before = (sample * (sample - 1) / 2).sum() / sample.sum()
    assert lengths.mean_context == pytest.approx(before, rel=0.02)


def test_a_batch_that_fits_the_engine_takes_as_long_as_its_longest_response() -> None:
    """Reckoned step by step: equal lengths have no end in which few run; few sequences read the weights for few."""
    equal, engine = Lengths(100.0, 1e-4, 4096), Engine(weights=1000.0, kv=1.0, slots=64)
    assert engine.token_cost(equal, 0.0, 8 * 16, 8) == pytest.approx(1000 / 16 + 49.5, rel=0.02)
    assert engine.token_cost(equal, 0.0, 8 * 6400, 8) == pytest.approx(1000 / 64 + 49.5, rel=0.02)
    assert engine.token_cost(equal, 10.0, 8, 8) == pytest.approx(1000 + 59.5, rel=0.02)


def test_larger_steps_and_fewer_sets_cost_less(tool: ModuleType) -> None:
    times = [speedup(batch, tool.REFERENCE) for batch in (64, 500, 4000, 100_000)]
    assert times == sorted(times, reverse=True) and times[-1] == pytest.approx(4.68, abs=0.01)
    costs = [scheduled(sets, 1e5, tool.REFERENCE).total for sets in (1, 2, 5, 10)]
    assert costs == sorted(costs)


def test_no_batch_does_what_is_out_of_reach() -> None:
    setting = Setting(Lengths(400.0, 1.0, 4096))
    assert batch_of(4.0, setting) is None, "reuse alone is 4.5"
    assert batch_of(1e6, setting) is None


def test_the_engine_is_openpangus() -> None:
    """Its matrices, without norms and biases; the head is the embedding."""
    layer = 2 * 1536 * 1536 + 2 * 1536 * 768 + 3 * 1536 * 6144
    assert Engine().weights == pytest.approx(2 * (26 * layer + 153_376 * 1536), rel=0.01)
    assert Engine().weights / Engine().kv == pytest.approx(29_000, rel=0.01)


@pytest.mark.heavy
def test_the_figure_is_drawn(tool: ModuleType, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--plot", str(tmp_path / "a.svg"), "--json", str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "a.svg").read_text().startswith("<?xml") and (tmp_path / "a.json").is_file()
    assert "| published: 2 sets" in capsys.readouterr().out
    assert tool.main(["--plot", str(tmp_path / "no" / "a.svg")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
