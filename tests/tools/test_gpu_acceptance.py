"""What the acceptance makes of what it runs, without a GPU: list, limits, verdicts, and the table of a run cut off."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from places import ROOT, TOOLS

MACHINE = {"GPU": "1 × Some GPU", "driver": "580.1"}
SLEEPER = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("gpu_acceptance")


@pytest.fixture
def accept(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The whole run of these checks, as if a GPU were here."""

    def run(*checks: Any, words: list[str] | None = None) -> int:
        monkeypatch.setattr(tool, "CHECKS", checks)
        monkeypatch.setattr(tool, "describe_machine", lambda: MACHINE)
        return tool.main(words or [])

    return run


def check(tool: ModuleType, name: str, run: Callable[[float], Any], needs: str | None = None) -> Any:
    return tool.Check(name, f"what {name} has with what it should have", "all pass", run, 5.0, needs)


# --- what it would do ---


def test_the_list_names_every_check_with_its_goal(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(tool.CHECKS)
    for line, one in zip(lines, tool.CHECKS, strict=True):
        assert line == f"{one.name}: compares {one.compares}; goal: {one.goal}"
    assert [line for line in lines if "≥ 90 %" in line and "≥ 85 %" in line and "≤ 1.3 ×" in line]
    assert [line.partition("goal: ")[2] for line in lines if line.startswith("MFU")] == ["≥ 35 %", "≥ 40 %"]


def test_tests_that_are_named_are_there(tool: ModuleType) -> None:
    """Every file of tests/gpu is run, and nothing that has moved."""
    source = Path(tool.__file__).read_text()
    named = {path for path in source.split('"') if path.startswith("tests/")}
    assert named and all((ROOT / path).exists() for path in named)
    assert {path for path in named if path.startswith("tests/gpu/")} == {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    }


@pytest.mark.heavy
def test_without_a_gpu_it_is_one_line(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("says what happens on a machine without a GPU")
    assert tool.main([]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "",
        "gpu_acceptance: error: no GPU that torch can use: must run on a machine with one\n",
    )


def test_an_unknown_check_is_refused(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--only", "speed"]) == 2
    assert capsys.readouterr().err.startswith("gpu_acceptance: error: --only speed: must be one of kernels; attention;")


# --- what it makes of what it finds ---


def test_what_is_missed_decides_and_what_is_missing_does_not(
    tool: ModuleType, accept: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = check(tool, "good", lambda _: tool.Measured("4 passed", True))
    bad = check(tool, "bad", lambda _: tool.Measured("30 %", False))
    absent = check(tool, "absent", lambda _: pytest.fail("was run"), "no_such_module")
    assert accept(good, absent) == 0
    assert "| no_such_module is not installed | skipped |" in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert accept(bad, good, words=["--json", str(report)]) == 1
    told = json.loads(report.read_text())
    assert told["machine"] == MACHINE
    assert [(one["name"], one["verdict"]) for one in told["checks"]] == [("bad", "missed"), ("good", "met")]


def test_a_run_that_is_cut_off_leaves_what_it_found(
    tool: ModuleType, accept: Callable[..., int], tmp_path: Path
) -> None:
    def cut_off(_: float) -> None:
        raise KeyboardInterrupt

    def broken(_: float) -> None:
        raise tool.FailedError("the kernels are not built")

    table = tmp_path / "table.md"
    checks = [check(tool, "broken", broken), check(tool, "last", cut_off)]
    with pytest.raises(KeyboardInterrupt):
        accept(*checks, words=["--output", str(table)])
    lines = table.read_text().splitlines()
    assert lines[0] == "GPU 1 × Some GPU, driver 580.1"
    assert len(lines) == 5 and "| the kernels are not built | failed |" in lines[-1]


def test_only_what_is_asked_for_is_run(tool: ModuleType, accept: Callable[..., int]) -> None:
    good = check(tool, "MFU, good", lambda _: tool.Measured("40 %", True))
    other = check(tool, "other", lambda _: pytest.fail("was run"))
    assert accept(good, other, words=["--only", "MFU, good"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "text", "good"),
    [
        ("def test_a(): pass\n\ndef test_b(): __import__('pytest').skip('no GPU')", "1 passed, 1 skipped", True),
        ("def test_a(): __import__('pytest').skip('no GPU')", "1 skipped", False),
        ("def test_a(): pass\n\ndef test_b(): assert 1 == 2", "1 failed, 1 passed; {file}::test_b", False),
        ("import no_such_module", "1 error; {file}", False),
    ],
)
def test_tests_pass_where_some_ran_and_none_failed(
    body: str, text: str, good: bool, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(body)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\n")
    found = tool.tests("--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini"), str(file))(60.0)
    assert found == (text.format(file=os.path.relpath(file, ROOT)), good)
    assert ("assert 1 == 2" in capsys.readouterr().err) == ("1 failed" in text), "why is said beside the table"


@pytest.mark.slow
def test_a_check_that_takes_too_long_leaves_no_process(tool: ModuleType, tmp_path: Path) -> None:
    """What it started would hold the memory of a GPU."""
    file = tmp_path / "pid"
    child = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(tool.FailedError, match=r"^took more than 3 s$"):
        tool.call([sys.executable, "-c", SLEEPER.format(child=child)], 3.0)
    state = Path(f"/proc/{file.read_text()}/stat")
    until = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.05)


# --- its benchmarks ---


def tool_that_writes(monkeypatch: pytest.MonkeyPatch, tool: ModuleType, *reports: Any) -> list[list[str]]:
    """The benchmarks leave these reports, one a run, or fail with these words; returns what they were called with."""
    calls, left = [], list(reports)

    def run_tool(name: str, *words: str, seconds: float) -> None:
        calls.append([name, *words])
        report = left.pop(0)
        if isinstance(report, str):
            raise tool.FailedError(report)
        Path(words[words.index("--json") + 1]).write_text(json.dumps(report))

    monkeypatch.setattr(tool, "run_tool", run_tool)
    return calls


def kernel_report(score: float, loss: float, times: float) -> dict[str, Any]:
    """Of two vocabularies, the second a little worse; the loss out of place much worse, which counts for nothing."""

    def of(vocabulary: int, operator: str, candidate: str, share: float, milliseconds: float) -> dict[str, Any]:
        return {
            "vocabulary": vocabulary,
            "operator": operator,
            "candidate": candidate,
            "bandwidth_share": share,
            "milliseconds": milliseconds,
        }

    results = []
    for vocabulary, worse in ((131_072, 1.05), (153_376, 1.0)):
        results += [
            of(vocabulary, "score", "torch", 0.1, 9.0),
            of(vocabulary, "score", "fused", score * worse, 1.0),
            of(vocabulary, "topk", "fused", 0.7, times / worse),
            of(vocabulary, "loss", "fused", 0.5, 5.0),
            of(vocabulary, "loss", "fused, in place", loss * worse, 3.0),
        ]
    return {"results": results}


@pytest.mark.parametrize(
    ("figures", "good"),
    [
        ((0.91, 0.86, 1.29), True),
        ((0.89, 0.86, 1.29), False),
        ((0.91, 0.84, 1.29), False),
        ((0.91, 0.86, 1.31), False),
    ],
)
def test_bandwidth_is_that_of_the_worst_vocabulary(
    figures: tuple[float, float, float], good: bool, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool_that_writes(monkeypatch, tool, kernel_report(*figures))
    score, loss, times = figures
    assert tool.bandwidth(10.0) == (f"score {score:.0%}, loss {loss:.0%}, top-k {times:.2f} × score", good)


@pytest.mark.parametrize(("mfu", "good"), [(0.36, True), (0.34, False)])
def test_no_more_is_recomputed_than_memory_asks(
    mfu: float, good: bool, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {"variants": {"packed": {"mfu": mfu, "tokens_per_second": 40_000.0, "peak_memory_bytes": 70 * 2**30}}}
    full = "benchmark_train.py ended with status 2: benchmark_train: error: packed: out of GPU memory; set --padded"
    calls = tool_that_writes(monkeypatch, tool, full, report)
    found = tool.utilisation("torch_varlen", 0.35)(60.0)
    assert found == (f"{mfu:.1%}, 40,000 tokens/s, 70 GiB, recompute block of 4 layers", good)
    assert [words[words.index("--recompute") + 1] for words in calls] == ["none", "block"]


def test_another_fault_is_no_want_of_memory(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tool_that_writes(monkeypatch, tool, "benchmark_train.py ended with status 2: te cannot run here")
    with pytest.raises(tool.FailedError, match="te cannot run here"):
        tool.utilisation("te", 0.40)(60.0)
    assert len(calls) == 1


@pytest.mark.slow
def test_the_benchmarks_take_the_words_they_are_given(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is started with its real words and one wrong one more, which it must be the first to refuse."""
    calls = tool_that_writes(monkeypatch, tool, "stop", "stop")
    for run in (tool.bandwidth, tool.utilisation("torch_varlen", 0.35)):
        with pytest.raises(tool.FailedError):
            run(60.0)
    for name, *words in calls:
        command = [sys.executable, str(TOOLS / name), *words, "--no-such-word"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "unrecognized arguments: --no-such-word" in done.stderr, done.stderr
