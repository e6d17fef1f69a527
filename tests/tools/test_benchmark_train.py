"""The trainer's benchmark: what its report holds, and that all variants do the same work. Says nothing about speed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

import pytest
from places import TOOLS

pytestmark = pytest.mark.slow
TOOL = TOOLS / "benchmark_train.py"
PACK, PACKS, STEPS = 256, 2, 2


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    command = f"--shape tiny --dtype float32 --threads 1 --sequence-length {PACK} --global-batch {PACKS} "
    command += f"--repeats {STEPS} --padded-samples 1 4 --json {path}"
    # In a process of its own: Megatron changes global state of torch.
    words = [sys.executable, str(TOOL), *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "packed is faster by" in done.stdout
    return json.loads(path.read_text())


def test_the_report_is_complete_and_its_figures_are_possible(report: dict[str, Any]) -> None:
    assert " ".join(report) == "machine model training samples peak memory variants speedup_of_packed"
    assert set(report["variants"]) == {"packed", "padded_1", "padded_4"}
    assert set(report["speedup_of_packed"]) == {"padded_1", "padded_4"}
    assert report["peak"]["flops_per_second"] > 0
    assert report["peak"]["source"].startswith("measured")
    for variant in report["variants"].values():
        assert len(variant["steps"]) == STEPS
        assert variant["seconds"] > 0 and variant["tokens_per_second"] > 0
        assert 0 < variant["fill"] <= 1
        assert 0 < variant["mfu"] <= variant["utilisation_with_padding"] < 1
        assert variant["peak_memory_bytes"] > report["memory"]["before_the_model_bytes"]
    for ratio in report["speedup_of_packed"].values():
        assert min(ratio["pairs"]) <= ratio["median"] <= max(ratio["pairs"])


def test_every_variant_trains_on_the_same_samples(report: dict[str, Any]) -> None:
    packed, *others = report["variants"].values()
    for other in others:
        for a, b in zip(packed["steps"], other["steps"], strict=True):
            assert a["tokens"] == b["tokens"]
            assert a["model_flops"] == b["model_flops"]
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)


def test_the_variants_are_laid_out_as_promised(report: dict[str, Any]) -> None:
    """Packs of a fixed size and nearly full; one sample a micro-batch has no padding; four have some."""
    packed, one, four = (report["variants"][name] for name in ("packed", "padded_1", "padded_4"))
    assert all(step["positions"] == step["micro_batches"] * PACK for step in packed["steps"])
    assert all(step["micro_batches"] == PACKS for step in packed["steps"])
    assert packed["fill"] > 0.9
    assert one["fill"] == 1
    assert four["fill"] < 0.9
    for a, b in zip(one["steps"], four["steps"], strict=True):
        assert b["micro_batches"] == -(-a["micro_batches"] // 4)
        assert b["computed_flops"] > a["computed_flops"] == a["model_flops"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--global-batch", "0"], "--global-batch 0: input should be greater than or equal to 1"),
        (["--threads", "two"], "--threads: invalid int value: 'two'"),
        (["--lengths", "120"], "--lengths 120: must be MEDIAN,SIGMA"),
        (["--recompute", "some"], "--recompute some"),
        (["--padded-samples", "4", "0"], "--padded-samples 4 0: must be at least 1"),
        (["--json", "/nowhere/report.json"], "--json /nowhere/report.json: the folder does not exist"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(TOOL.parent)
    tool = importlib.import_module(TOOL.stem)
    assert tool.main(["--shape", "tiny", *arguments]) == 2
    assert_one_line(capsys.readouterr().err, complaint)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(TOOL.parent)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert importlib.import_module(TOOL.stem).main(["--shape", "tiny"]) == 2
    assert_one_line(capsys.readouterr().err, "WORLD_SIZE = 2: must be 1")


def assert_one_line(text: str, complaint: str) -> None:
    assert text.startswith("benchmark_train: error: ")
    assert text.count("\n") == 1
    assert complaint in text
