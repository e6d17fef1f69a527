"""A machine that is too small for a run: said in one line that names what is needed and what is there."""

from __future__ import annotations

import re

import pytest
from inputs import Inputs

from megatron_npd.cli import main
from megatron_npd.hardware import host
from megatron_npd.hardware.device import environment_device
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.prepare.machine import check_machine
from megatron_npd.process.waiting import takes_turns
from megatron_npd.supervise import supervisor

MIB = 2**20
pytestmark = pytest.mark.skipif(environment_device() != "cpu", reason="roles on GPUs need little of this memory")


def has(monkeypatch: pytest.MonkeyPatch, total: int, available: int, swap: int = 0) -> None:
    """This machine seems to have so much memory, MiB."""
    memory = host.Memory(total * MIB, available * MIB, swap * MIB)
    monkeypatch.setattr(host, "memory", lambda: memory)


def needed(inputs: Inputs) -> tuple[int, int]:
    """What all roles, and the largest alone, are estimated to take, MiB."""
    need = check_machine(inputs.config, *map(read_model_dims, (inputs.teacher, inputs.student)))
    assert need is not None
    return round(need.together / MIB), round(need.largest / MIB)


def check(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["check", str(inputs.path)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_enough(inputs: Inputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    has(monkeypatch, 24 * 1024, 20 * 1024)
    status, out, _ = check(inputs, capsys)
    assert status == 0
    assert re.search(
        r"^all roles together take up to \d\.\d GiB of memory; 20.0 GiB of this machine's 24.0 GiB", out, re.M
    )


def test_every_rank_counts(inputs: Inputs) -> None:
    before, _ = needed(inputs)
    inputs.set("training", {"data_parallel_size": 4, "sequence_length": 128})
    after, _ = needed(inputs)
    assert after > before + 3 * 200, "each process has its libraries"


def test_too_little_for_all_together_is_a_warning(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together, _ = needed(inputs)
    has(monkeypatch, 24 * 1024, together - 100)
    status, out, _ = check(inputs, capsys)
    assert status == 0
    (line,) = (line for line in out.splitlines() if line.startswith("memory may not be enough: "))
    assert re.search(r"take up to \d\.\d GiB, and \d\.\d GiB of this machine's 24.0 GiB are free", line)
    monkeypatch.setattr(supervisor, "watch_run", lambda *_: 1)
    assert main(["run", str(inputs.path)]) == 1
    assert f"npd: {line}\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "run"])
def test_too_little_for_one_of_them_is_refused(
    command: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs.set("rollout.kv_cache_gib", 64.0)
    has(monkeypatch, 8 * 1024, 7 * 1024, swap=2048)
    assert main([command, str(inputs.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"npd: error: memory of this machine = 8.0 GiB and 2.0 GiB of swap: must hold the rollout\w* of this run, "
        r"which takes 64\.\d GiB by itself",
        line,
    )


def test_swap_is_memory_enough_to_try(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    _, largest = needed(inputs)
    has(monkeypatch, largest // 2, largest // 4, swap=largest)
    needed(inputs)


def test_roles_take_turns_on_fewer_cores_than_they_want(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, True), (4, True), (5, False)):  # 2 + 2 + 1 threads by default
        monkeypatch.setattr("megatron_npd.process.waiting.cores", lambda cores=cores: cores)
        assert takes_turns(inputs.config) is expected
