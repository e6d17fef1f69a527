"""Publishing a checkpoint's weights from one process without a model: for tests of the writing alone.

As a program: `crash` kills itself at every durable operation in turn, `full` runs out of disk and permission. Both
print what they saw as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_npd.distributed.parallel import SINGLE
from megatron_npd.errors import UserError
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.models.tensor_map import parameter_map
from megatron_npd.run_directory import RunDirectory
from megatron_npd.versions.manifest import ParityProbe, published_versions, verify_version
from megatron_npd.weights.layouts import shard
from megatron_npd.weights.publish import Publisher
from megatron_npd.weights.source import open_checkpoint

PROBE = ParityProbe([[1, 2, 3]], [[-1.0, -2.0]])


def parameters_of(folder: Path, rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
    """A checkpoint's weights by Megatron name, as one tensor-parallel rank of a single stage has them."""
    dims = read_model_dims(folder)
    parameters = {}
    with open_checkpoint(folder) as files:
        for name, parameter in parameter_map(dims).items():
            tensors = [files[hf_name].get_tensor(hf_name) for hf_name in parameter.hugging_face]
            parameters[name] = shard(parameter, tensors, dims, rank, size).clone()
    return parameters


def make_publisher(run: RunDirectory, checkpoint: Path, **options: Any) -> Publisher:
    """For `parameters_of(checkpoint)`."""
    dims = read_model_dims(checkpoint)
    return Publisher(run, parameters_of(checkpoint), dims, SINGLE, checkpoint, **options)


def publish(run: RunDirectory, checkpoint: Path, version: int) -> None:
    """Publish to the end."""
    publisher = make_publisher(run, checkpoint)
    publisher.publish(version, parameters_of(checkpoint), PROBE)
    publisher.wait()


def crash(run: RunDirectory, checkpoint: Path) -> list[dict[str, Any]]:
    """Kill a publication of version 1 at its first, second, ... durable operation, then publish it again, each time."""
    publish(run, checkpoint, 0)
    seen = []
    for point in range(1, 100):
        child = os.fork()
        if child == 0:
            _publish_and_die(run, checkpoint, point)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0, f"the publication failed at {point}"
        visible = published_versions(run)
        left = [path.name for path in run.weights.iterdir() if path.name.startswith(".")]
        whole = [verify_version(run.version(version)).version for version in visible]
        if 1 not in visible:
            publish(run, checkpoint, 1)
        after = sorted(path.name for path in run.weights.iterdir())
        verify_version(run.version(1))
        seen.append({"killed": killed, "visible": visible, "whole": whole, "left": left, "after": after})
        if not killed:
            return seen
        shutil.rmtree(run.version(1))
    raise AssertionError("a publication has more durable operations than can be")


def _publish_and_die(run: RunDirectory, checkpoint: Path, point: int) -> NoReturn:
    status = 1
    try:
        _die_at(point)
        publish(run, checkpoint, 1)
        status = 0
    finally:
        os._exit(status)


def _die_at(point: int) -> None:
    """Kill this process instead of its `point`-th fsync or rename, counted from 1."""
    done = 0

    def mortal(operation: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return call

    os.fsync, os.rename = mortal(os.fsync), mortal(os.rename)


def full(run: RunDirectory, checkpoint: Path) -> list[dict[str, Any]]:
    """Version 0 fits on a small disk, version 1 does not; then the disk becomes read-only."""
    publish(run, checkpoint, 0)
    seen = []
    for version in (1, 2):
        try:
            publish(run, checkpoint, version)
        except UserError as error:
            names = sorted(path.name for path in run.weights.iterdir())
            whole = verify_version(run.version(0)).version
            seen.append({"error": str(error), "left": names, "whole": whole})
        subprocess.run(["mount", "-o", "remount,ro", str(run.weights)], check=True)
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    action = {"crash": crash, "full": full}[sys.argv[1]]
    print(json.dumps(action(RunDirectory(Path(sys.argv[2])), Path(sys.argv[3]))))
