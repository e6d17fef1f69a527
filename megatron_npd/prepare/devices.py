"""`npd check --devices`: whether this node's GPUs, and what is installed for them, do what the roles need. Seconds."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from megatron_npd.config import Config
from megatron_npd.errors import UserError
from megatron_npd.estimates.text import role_memories, size_text
from megatron_npd.hardware import device
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.prepare import device_probes

PROBE_SECONDS = 300.0
FLOORS = {"torch": ("2.11", None), "megatron-core": ("0.16", "0.20"), "vllm": ("0.32", None)}
"""Distribution -> the oldest version that will do, and the first that was not tried."""


class NotWellError(Exception):
    """What is wrong, in one line."""


@dataclass(frozen=True)
class DeviceCheck:
    """One line of the answer."""

    name: str
    what: str
    """What is looked at, in words that follow the name."""
    run: Callable[[Config], str]
    """What was found; raises NotWellError."""


def check_devices(config: Config) -> Iterator[tuple[bool, str]]:
    """(whether it is well, its line) of each check, as it is done.

    Raises:
        UserError: there is no GPU here to check; the text says what would have been.
    """
    device.settle()
    if reason := _no_gpu():
        raise UserError(f"--devices: {reason}")
    for check in CHECKS:
        try:
            yield True, f"ok: {check.name}: {check.run(config)}"
        except NotWellError as error:
            yield False, f"NOT WELL: {check.name}: {error}"


def planned() -> Iterator[str]:
    """What would be checked, a line each."""
    for check in CHECKS:
        yield f"{check.name}: {check.what}"


def _no_gpu() -> str | None:
    """Why there is nothing to check."""
    if unused := device.unused_gpus():
        return unused
    import torch

    if torch.cuda.is_available():
        return None
    visible = os.environ.get(device.VISIBLE)
    reason = f" ({device.VISIBLE} = {visible!r})" if visible is not None else _unfit_driver()
    return f"no GPU can be used here{reason}; must be run on a node that has some"


def _unfit_driver() -> str:
    """Torch finds no GPU where the driver is too old for it, and says so in a warning only."""
    if not device.has_gpu():
        return ""
    try:
        compare_driver()
    except NotWellError as error:
        return f" ({error})"
    return ""


def _versions(_: Config) -> str:
    found = []
    for name, (oldest, first_untried) in FLOORS.items():
        version = _installed(name)
        if version is None:
            raise NotWellError(f"{name} is not installed; {device.FOR_GPUS}")
        release = Version(Version(version).base_version)
        if release < Version(oldest):
            raise NotWellError(f"{name} = {version}: must be {oldest} or later")
        untried = " (newer than what was tried)" if first_untried and release >= Version(first_untried) else ""
        found.append(f"{name} {version}{untried}")
    try:
        importlib.import_module("transformer_engine.pytorch")
        found.append(f"transformer-engine {_installed('transformer-engine')}")
    except Exception as error:  # a compiled extension may fail in any way when its CUDA does not fit
        found.append(f"no Transformer Engine ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
    return ", ".join(found)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compare_driver() -> str:
    """Which CUDA the driver serves, and torch is built for.

    Raises:
        NotWellError: the driver is too old, or does not say its version.
    """
    import torch

    if torch.version.cuda is None:
        raise NotWellError(f"torch {torch.__version__} is no CUDA build")
    try:
        told = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    except OSError as error:
        raise NotWellError(f"nvidia-smi: {error.strerror}") from None
    driver = re.search(r"Driver Version: (\S+)", told)
    serves = re.search(r"CUDA(?: UMD)? Version: (\d+)\.(\d+)", told)
    if not driver or not serves:
        raise NotWellError("nvidia-smi does not say its driver's version")
    fits = f"{driver[1]} serves CUDA {serves[1]}.{serves[2]}, torch is built for {torch.version.cuda}"
    if int(torch.version.cuda.partition(".")[0]) <= int(serves[1]):
        return fits
    if torch.cuda.is_available():
        return f"{fits}, and finds its GPUs all the same (NVIDIA's forward-compatibility package)"
    raise NotWellError(
        f"driver {driver[1]} serves CUDA {serves[1]}.{serves[2]}; torch {torch.__version__} is built for CUDA "
        f"{torch.version.cuda} and needs a newer driver, or NVIDIA's forward-compatibility package"
    )


def _probe(name: str) -> Callable[[Config], str]:
    return lambda config: run_probe(name, 1)


def _training(_: Config) -> str:
    import torch

    ranks = torch.cuda.device_count()
    return f"{run_probe('training_step', ranks)}, over {device_probes.counted(device_probes.devices())}"


def run_probe(name: str, ranks: int) -> str:
    """What a probe found, run by `ranks` processes that meet.

    Raises:
        NotWellError: it failed, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "WORLD_SIZE": str(ranks),
            "NPD_RENDEZVOUS": str(Path(folder) / "rendezvous"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        said = [Path(folder) / f"rank{rank}" for rank in range(ranks)]
        processes = [
            _start_rank(name, os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, said[rank])
            for rank in range(ranks)
        ]
        try:
            status, failed = _first_failure(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        lines = said[failed or 0].read_text().strip().splitlines()
    if failed is None:
        return lines[-1]
    which = f"rank {failed} of {ranks}: " if ranks > 1 else ""
    raise NotWellError(which + (lines or [f"ended with status {status}"])[-1])


def _start_rank(name: str, environment: Mapping[str, str], said: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", device_probes.__name__, name]
    with said.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.DEVNULL)


def _first_failure(processes: list[subprocess.Popen[bytes]]) -> tuple[int, int | None]:
    """(exit status, rank) of the first process to fail, while others may wait for it; (0, None): all ended well.

    Raises:
        NotWellError: they take too long.
    """
    until = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < until:
        ended = [process.poll() for process in processes]
        for rank, status in enumerate(ended):
            if status:
                return status, rank
        if None not in ended:
            return 0, None
        time.sleep(0.05)
    raise NotWellError(f"took more than {PROBE_SECONDS:.0f} s")


def _memory(config: Config) -> str:
    import torch

    free = min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    dims = (read_model_dims(config.models.teacher), read_model_dims(config.models.student))
    largest = max(role_memories(config, *dims, "gpu"), key=lambda memory: memory.bytes)
    if largest.bytes > free:
        raise NotWellError(
            f"{size_text(free)} are free on a GPU; the {largest.role} takes {size_text(largest.bytes)} by estimate"
        )
    return f"{size_text(free)} free on every GPU; the {largest.role} takes most, {size_text(largest.bytes)} by estimate"


CHECKS = (
    DeviceCheck("versions", "what is installed, and whether it is recent enough", _versions),
    DeviceCheck("driver", "whether it serves the CUDA that torch is built for", lambda _: compare_driver()),
    DeviceCheck("kernels", "the fused operators against float64, on every GPU", _probe("kernels")),
    DeviceCheck("attention", "every backend that runs here against the reference in float32", _probe("attention")),
    DeviceCheck("training", "one optimizer step of a small model on every GPU, over NCCL", _training),
    DeviceCheck("vLLM", "one prompt to a small model", _probe("engine")),
    DeviceCheck("memory", "what is free on the GPUs against what the largest role takes by estimate", _memory),
)
