"""Running npd as users do, a trainer by itself, and comparing what two of them published."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ranks import STACKS, wait_for_ranks

from megatron_npd.config import Config, load_config
from megatron_npd.files import read_json
from megatron_npd.run_directory import RunDirectory
from megatron_npd.versions.manifest import MANIFEST, published_versions


def npd(*arguments: str | Path, status: int = 0) -> str:
    """Run an npd command to its end; its stdout."""
    command = [sys.executable, "-m", "megatron_npd.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == status, done.stderr[-6000:]
    return done.stdout


def train_again(original: RunDirectory, folder: Path, *flags: str) -> RunDirectory:
    """Another run, of the same buffer, by the trainer alone; `flags` of Python, e.g. -O."""
    copy = RunDirectory(folder)
    for name in ("prompts", "rollouts", "samples"):
        shutil.copytree(original.root / name, copy.root / name)
    for name in ("config.toml", "provenance.json"):
        shutil.copy(original.root / name, copy.root / name)
    copy.config.write_text(copy.config.read_text().replace(str(original.root), str(copy.root)))
    run_trainer(load_config(copy.config), copy, *flags)
    return copy


def assert_same_versions(original: RunDirectory, copy: RunDirectory) -> None:
    for version in published_versions(original):
        ours, theirs = (read_json(run.version(version) / MANIFEST) for run in (copy, original))
        assert ours["files"] == theirs["files"], f"version {version} differs"


def run_trainer(config: Config, run: RunDirectory, *flags: str) -> None:
    """Every trainer rank as the supervisor starts it, without any other role."""
    ranks, logs = [], []
    for rank in range(config.training.world_size):
        environment = (
            os.environ
            | STACKS
            | {
                "RANK": str(rank),
                "WORLD_SIZE": str(config.training.world_size),
                "NPD_RENDEZVOUS": str(run.root / "rendezvous"),
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": str(config.training.threads),
            }
        )
        command = [sys.executable, *flags, "-m", "megatron_npd.cli", "trainer", str(run.config)]
        logs.append(run.root / f"trainer.rank{rank}.log")
        with open(logs[-1], "w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stderr=log, text=True))
    wait_for_ranks(ranks, logs, seconds=300)
