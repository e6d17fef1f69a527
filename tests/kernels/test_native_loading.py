"""Which implementation runs, and that it is said: missing, stale, broken and required libraries, forced ones."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_npd.distributed.parallel import SINGLE
from megatron_npd.errors import UserError
from megatron_npd.kernels import build, native, token_logprobs

LOGITS, TARGETS = torch.randn(3, 9), torch.arange(3)
SWITCHES = ("NPD_REQUIRE_KERNELS", "NPD_DISABLE_KERNELS", "NPD_CPU_ISA")
built = pytest.mark.skipif(not build.library_file("cpu").exists(), reason="the fused operators are not built")


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """As in a process that has not used kernels yet."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native, "_obstacles", {})
    caplog.set_level(logging.INFO)
    yield
    if BEST_ISA:
        torch.ops.megatron_npd.cpu_isa(BEST_ISA)


def best_isa() -> str:
    """What the library chooses by itself; nothing where it is not built."""
    if not build.library_file("cpu").exists():
        return ""
    torch.ops.load_library(str(build.library_file("cpu")))
    return torch.ops.megatron_npd.cpu_isa("")


BEST_ISA = best_isa()


def scores() -> torch.Tensor:
    return token_logprobs(LOGITS, TARGETS, SINGLE, 9)


def assert_right(logprobs: torch.Tensor) -> None:
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[TARGETS, TARGETS])


def test_where_there_is_a_compiler_they_are_built() -> None:
    """Else the tests that need them would be skipped, and nobody would know."""
    if shutil.which("g++"):
        assert build.library_file("cpu").exists(), f"run {build.COMMAND}"


@built
def test_it_says_once_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    assert_right(scores())
    assert_right(scores())
    assert [record.getMessage() for record in caplog.records] == [f"kernels on cpu: fused operators ({BEST_ISA})"]


@built
def test_an_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("NPD_CPU_ISA", "scalar")
    assert_right(scores())
    assert "kernels on cpu: fused operators (scalar)" in caplog.text


@built
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPD_CPU_ISA", "mmx")
    with pytest.raises(UserError, match="NPD_CPU_ISA = 'mmx': must be scalar, avx2 or avx512"):
        scores()


def test_disabled_kernels_are_announced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("NPD_DISABLE_KERNELS", "1")
    assert_right(scores())
    assert not native.run_on("cpu")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "kernels on cpu: plain torch, which is several times slower: NPD_DISABLE_KERNELS=1" in caplog.text


@built
def test_disabled_for_a_block() -> None:
    assert native.runs(LOGITS)
    with native.disabled(), native.disabled():
        assert not native.runs(LOGITS) and not native.run_on("cpu")
        assert_right(scores())
    assert native.runs(LOGITS)


MISSING = {
    "missing": ({}, r"libnpd_cpu-\w+\.so is missing; build it with `python -m megatron_npd\.kernels\.build`"),
    "stale": (
        {"libnpd_cpu-0123456789abcdef.so": b"of other sources"},
        r"libnpd_cpu-0123456789abcdef\.so was built from other sources; build it with `python -m",
    ),
    "broken": (
        {build.library_file("cpu").name: b"no library"},
        r"libnpd_cpu-\w+\.so can't be loaded: .*; remove it and build it again with `python -m",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_without_a_library_the_reference_runs_and_says_why(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files, reason = MISSING[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    assert_right(scores())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(f"plain torch, which is several times slower: .*{reason}", caplog.text)


@pytest.mark.parametrize("case", MISSING)
def test_required_kernels_refuse_to_run_without(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, reason = MISSING[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    monkeypatch.setenv("NPD_REQUIRE_KERNELS", "1")
    with pytest.raises(UserError, match=f"NPD_REQUIRE_KERNELS=1: the fused operators can't run on cpu: .*{reason}"):
        scores()
    with pytest.raises(UserError, match="NPD_REQUIRE_KERNELS=1"):  # not only the first time
        scores()


def test_switches_that_contradict_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPD_REQUIRE_KERNELS", "1")
    monkeypatch.setenv("NPD_DISABLE_KERNELS", "1")
    with pytest.raises(UserError, match="set at most one of them"):
        scores()


def test_a_library_is_named_by_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    before = {kind: build.library_file(kind) for kind in ("cpu", "cuda")}
    monkeypatch.setattr(build, "SOURCES", sources)
    assert {kind: build.library_file(kind) for kind in before} == before, "where the sources lie makes no difference"
    for changed, kinds in (("cpu/rows.h", {"cpu"}), ("core.h", {"cuda"}), ("ops.cpp", {"cpu", "cuda"})):
        (sources / changed).write_text((sources / changed).read_text() + "\n")
        after = {kind: build.library_file(kind) for kind in before}
        assert {kind for kind in before if after[kind] != before[kind]} == kinds
        before = after
    monkeypatch.setattr(build, "CPU_FLAGS", [*build.CPU_FLAGS, "-g"])
    assert build.library_file("cpu") != before["cpu"] and build.library_file("cuda") == before["cuda"]


@pytest.mark.parametrize(
    ("compiler", "message"), [("no_such_compiler", "no_such_compiler: No such file"), ("false", "false .* failed")]
)
def test_a_failed_build_is_loud_and_leaves_nothing(
    compiler: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(build.BuildError, match=message):
        build.build_cpu(tmp_path)
    assert not build.build(tmp_path) and "NOT built, the plain torch reference will run" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_the_build_says_that_torch_is_missing() -> None:
    """As in pip's isolated environment: the lone file, in a Python without torch."""
    script = [sys.executable, "-I", "-S", str(Path(build.__file__))]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 1
    assert "torch can't be imported" in result.stderr and "--no-build-isolation" in result.stderr
