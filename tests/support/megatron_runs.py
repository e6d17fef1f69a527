"""Starting `megatron_worker.py` on several processes and collecting what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from ranks import STACKS, wait_for_ranks
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("megatron_worker.py")
TIMEOUT_SECONDS = 400


@dataclass(frozen=True)
class Outcome:
    """What a training run leaves: a record a step, and the model in Hugging Face names before and after."""

    history: list[dict[str, float]]
    loaded: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]
    checkpoints: Path


def train(checkpoint: Path, out: Path, world_size: int = 1, steps: int = 3, **job: Any) -> Outcome:
    """One training run on `world_size` processes."""
    return train_all({"": {"steps": steps} | job}, checkpoint, out, world_size)[""]


def train_all(jobs: dict[str, dict[str, Any]], checkpoint: Path, out: Path, world_size: int = 1) -> dict[str, Outcome]:
    """Several training runs, one after another in the same processes (starting them takes longer than training)."""
    common = {"checkpoint": str(checkpoint), "steps": 3}
    for name in jobs:
        (out / name).mkdir(parents=True, exist_ok=True)
    described = [common | {"out": str(out / name)} | job for name, job in jobs.items()]
    run_ranks([sys.executable, str(WORKER), json.dumps(described)], world_size, out / "rendezvous")
    return {name: _outcome(out / name) for name in jobs}


def run_ranks(command: list[str], world_size: int, rendezvous: Path) -> None:
    """Run one process a rank to its end."""
    with tempfile.TemporaryDirectory() as folder:
        ranks, logs = [], [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        for rank, path in enumerate(logs):
            with open(path, "w") as log:
                ranks.append(_start_rank(command, rank, world_size, rendezvous, log))
        wait_for_ranks(ranks, logs, TIMEOUT_SECONDS)


def start_ranks(
    command: list[str], world_size: int, rendezvous: Path, output: IO[str] | int = subprocess.PIPE
) -> list[subprocess.Popen[str]]:
    """Start one process a rank; their output is to be read by the caller, unless it is given a file."""
    return [_start_rank(command, rank, world_size, rendezvous, output) for rank in range(world_size)]


def _start_rank(
    command: list[str], rank: int, world_size: int, rendezvous: Path, output: IO[str] | int
) -> subprocess.Popen[str]:
    environment = (
        os.environ
        | STACKS
        | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "NPD_RENDEZVOUS": str(rendezvous),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
    )
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def assert_same_training(ours: Outcome, reference: Outcome, relative: float = 1e-5) -> None:
    """Loss, gradient norm and weights of every step agree, weights also as fractions of their change.

    Needs an Adam epsilon that is not tiny beside the gradients: the first steps are otherwise ±lr whatever the
    gradient's size, and rounding decides the sign of a gradient that is zero.
    """
    for step, (a, b) in enumerate(zip(ours.history, reference.history, strict=True)):
        assert a["tokens"] == b["tokens"]
        for name in ("loss", "norm"):
            assert abs(a[name] - b[name]) <= relative * abs(b[name]), f"{name} of step {step}: {a[name]}, {b[name]}"
    for name, expected in reference.trained.items():
        error = (ours.trained[name] - expected).norm()
        change = (expected - reference.loaded[name]).norm()
        assert change > 0, f"{name} was not trained"
        assert error <= relative * expected.norm(), f"{name}: off by {error / expected.norm():.1e} of its norm"
        assert error <= 100 * relative * change, f"{name}: off by {error / change:.1e} of its change"


def _outcome(out: Path) -> Outcome:
    def stages(name: str) -> dict[str, torch.Tensor]:
        merged: dict[str, torch.Tensor] = {}
        for file in sorted(out.glob(f"{name}_*.safetensors")):
            merged |= load_file(file)
        return merged

    history = json.loads((out / "history.json").read_text())
    return Outcome(history, stages("loaded"), stages("trained"), out / "checkpoints")
