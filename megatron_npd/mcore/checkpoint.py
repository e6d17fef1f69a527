"""Saving and loading model and optimizer as a Megatron torch_dist checkpoint, with the run's state beside it.

`checkpoints/iter_0000120/` is written under a temporary name and renamed when complete; `latest.txt` names the current
one and is replaced atomically.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_npd.errors import UserError
from megatron_npd.mcore.optimizer import Trainable, unwrap
from megatron_npd.mcore.parallel import barrier
from megatron_npd.run_directory import fsync_folder, read_json, write_atomically, write_json

LATEST = "latest.txt"
STATE = "run_state.json"


def save_checkpoint(folder: Path, step: int, trainable: Trainable, run_state: dict[str, Any]) -> Path:
    """Save everything under `folder/iter_{step:07d}` and make it current. Every rank calls this."""
    final = folder / f"iter_{step:07d}"
    staging = folder / f".staging-{final.name}"
    if trainable.parallel.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    barrier()
    dist_checkpointing.save(_sharded_state(trainable, loading=False), str(staging))
    barrier()
    if trainable.parallel.rank == 0:
        write_json(staging / STATE, run_state)
        fsync_folder(staging)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(staging, final)
        write_atomically(folder / LATEST, f"{final.name}\n".encode())
    barrier()
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The current checkpoint, or None before the first."""
    latest = folder / LATEST
    return folder / latest.read_text().strip() if latest.is_file() else None


def load_checkpoint(checkpoint: Path, trainable: Trainable) -> dict[str, Any]:
    """Load weights and optimizer in place and return the run state saved with them.

    Raises:
        UserError: the distributed optimizer is on. With torch's Adam, megatron-core 0.16 loses its step counts on the
            way (measured: the second step after a restart differs), so a restart would train on wrongly.
    """
    if trainable.model.ddp_config.use_distributed_optimizer:
        raise UserError(
            f"training.distributed_optimizer = true: {checkpoint} cannot be resumed with it yet; start a new "
            "run_directory, or set it to false from the beginning"
        )
    state = dist_checkpointing.load(_sharded_state(trainable, loading=True), str(checkpoint))
    unwrap(trainable).load_state_dict(state["model"])
    trainable.optimizer.load_state_dict(state["optimizer"])
    return read_json(checkpoint / STATE)


def load_model_only(checkpoint: Path, model: Any) -> None:
    """Load the weights of a checkpoint into a bare model."""
    state = dist_checkpointing.load({"model": model.sharded_state_dict(prefix="")}, str(checkpoint))
    model.load_state_dict(state["model"])


def _sharded_state(trainable: Trainable, loading: bool) -> dict[str, Any]:
    model = unwrap(trainable).sharded_state_dict(prefix="")
    optimizer = trainable.optimizer.sharded_state_dict(
        model, is_loading=loading, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
    )
    return {"model": model, "optimizer": optimizer}
