"""A published version is read by nobody who did not verify it, and refused by every role in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from inputs import Inputs
from shard_factory import make_shard
from tiny_models import make_llama, publish

from megatron_npd.buffer.shards import write_shard
from megatron_npd.errors import BadVersionError
from megatron_npd.prepare.prepare import prepare
from megatron_npd.versions.manifest import verified

WEIGHTS = "model.safetensors"


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return publish(make_llama(tmp_path / "v000003", 0), 3)


def overwrite(folder: Path) -> None:
    """In place, at the same size."""
    with open(folder / WEIGHTS, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")


def replace(folder: Path) -> None:
    """By a file of the same content: who read the old one and the new one cannot know."""
    shutil.copy2(folder / WEIGHTS, folder / "new")
    os.rename(folder / "new", folder / WEIGHTS)


def leave_alone(folder: Path) -> None:
    """Nothing is wrong with its files."""


def another(folder: Path) -> None:
    (folder / "another.safetensors").touch()


def test_a_version_that_is_left_alone_is_held(version: Path) -> None:
    with verified(version, 3) as manifest:
        assert set(manifest.files) >= {WEIGHTS, "config.json", "parity.json"}


@pytest.mark.parametrize(
    ("happens", "name"),
    [(overwrite, WEIGHTS), (replace, WEIGHTS), (another, "another.safetensors"), (shutil.rmtree, "config.json")],
)
def test_what_changes_while_it_is_read_is_refused(version: Path, happens: Callable[[Path], object], name: str) -> None:
    with pytest.raises(BadVersionError, match=f"v000003/{name}: changed while it was being loaded"):
        with verified(version, 3):
            happens(version)


def test_another_version_or_none_is_refused(version: Path) -> None:
    for folder, number, message in (
        (version, 4, "v000003: the manifest says version 3, expected 4"),
        (version.parent / "v000009", 9, "v000009/version.json: no readable manifest"),
    ):
        with pytest.raises(BadVersionError, match=message), verified(folder, number):
            raise AssertionError("its files must not be read")


@pytest.mark.slow
@pytest.mark.parametrize("role", [["annotator"], ["rollout", "--policy", "student"]], ids=["annotator", "rollout"])
@pytest.mark.parametrize(
    ("number", "damage", "message"),
    [
        (0, overwrite, "content differs from the checksum of version 0"),
        (1, leave_alone, "the manifest says version 1, expected 0"),
    ],
    ids=["damaged", "mislabelled"],
)
def test_every_role_refuses_it_in_one_line(
    inputs: Inputs, role: list[str], number: int, damage: Callable[[Path], object], message: str
) -> None:
    """With status 1: the supervisor tries again, for it may have been read wrongly."""
    run = prepare(inputs.config)
    damage(publish(shutil.copytree(inputs.root / "student", run.version(0)), number))
    if role == ["annotator"]:
        write_shard(run.unit("rollouts", "round_0000", 0), make_shard("rollouts"))
    command = [sys.executable, "-m", "megatron_npd.cli", role[0], str(run.config), *role[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"npd: error: {run.version(0)}") and last.endswith(message)
    assert "Traceback" not in done.stderr
    assert not run.unit("samples", "round_0000", 0).exists()
