"""Checkpoints of model, optimizer and run state: written in the background, current atomically, loadable anywhere.

`checkpoints/iter_0000120/` is a Megatron torch_dist checkpoint with `run_state.json` beside it. It is written under a
temporary name and renamed when every rank has written its part; `latest.txt` names the current one and is replaced
atomically; older ones than the newest N are deleted after that. Weights and optimizer state are stored by global
shape, so any tensor, pipeline and data parallel size can load them. No random state is stored: nothing in training is
random (no dropout; order and learning rate are functions of the step).
"""

from __future__ import annotations

import functools
import inspect
import io
import logging
import os
import shutil
import threading
import time
import uuid
from multiprocessing.context import ForkProcess
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.multiprocessing import get_context

from megatron_npd.distributed.collectives import barrier, broadcast_object
from megatron_npd.errors import StorageError, storage_reason
from megatron_npd.files import fsync_folder, make_durable, probe_writing, read_json, write_atomically, write_json
from megatron_npd.mcore import optimizer_state
from megatron_npd.mcore.optimizer import Trainable
from megatron_npd.process import stopping
from megatron_npd.process.parent_death import die_with, stay_until_death_of
from megatron_npd.process.waiting import Reminder
from megatron_npd.run_directory import CHECKPOINT_STATE as STATE
from megatron_npd.run_directory import LATEST_CHECKPOINT as LATEST

logger = logging.getLogger(__name__)
STAGING = ".staging-"
COMMON = "common.pt"


class Checkpointer:
    """Saves one checkpoint at a time. Every rank makes one and calls its methods at the same places."""

    def __init__(self, folder: Path, trainable: Trainable, keep: int = 2, asynchronous: bool = True):
        self.folder = folder
        self.trainable = trainable
        self.keep = keep
        self.asynchronous = asynchronous
        self._calls = AsyncCallsQueue()
        _use_mortal_results_queue()
        self._is_first = trainable.parallel.rank == 0

    def save(self, step: int, run_state: dict[str, Any]) -> None:
        """Save the state after `step` optimizer steps. Returns when it is copied; it is current once `poll` or
        `wait` have found it written (or at once, if not asynchronous)."""
        self.wait()
        final = self.folder / f"iter_{step:07d}"
        # A name of its own: a writer that outlived a killed trainer cannot write into this one's files.
        staging = Path(broadcast_object(str(self.folder / f"{STAGING}{final.name}-{uuid.uuid4().hex[:8]}")))
        if self._is_first:
            for leftover in self.folder.glob(f"{STAGING}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir(parents=True)
            write_json(staging / STATE, {"optimizer_steps": step, "run": run_state})
            write_common(staging)
        barrier()
        request = dist_checkpointing.save(
            self._state_to_save(),
            str(staging),
            TorchDistSaveShardedStrategy("torch_dist", 1),
            async_sharded_save=True,
            **_own_writer_of_megatron(),
        )
        request.add_finalize_fn(functools.partial(self._make_current, staging, final))
        self._calls.schedule_async_request(_in_own_writer(request))
        if not self.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Make a save current if every rank has written its part.

        Raises:
            StorageError, RuntimeError: on every rank, if any could not write its part. The checkpoint before stays
                current.
        """
        try:
            self._calls.maybe_finalize_async_calls(blocking=False)
        except CheckpointException as error:
            raise _not_written(self.folder, error) from error

    def wait(self) -> None:
        """Return when the save under way, if any, is current; says so when that takes long."""
        reminder = Reminder()
        while self._calls.get_num_unfinalized_calls():
            self.poll()
            reminder.still("the checkpoint to be written")
            time.sleep(0.01)

    def _state_to_save(self) -> dict[str, Any]:
        model = model_state(self.trainable.models)
        return {"model": model, "optimizer": optimizer_state.sharded_for_saving(self.trainable, model)}

    def _make_current(self, staging: Path, final: Path) -> None:
        if self._is_first:
            make_durable(staging)
            assert latest_checkpoint(self.folder) != final, f"{final} is current: a step is saved once"
            shutil.rmtree(final, ignore_errors=True)  # complete, but never made current: its trainer was killed
            os.rename(staging, final)
            fsync_folder(self.folder)
            write_atomically(self.folder / LATEST, f"{final.name}\n".encode())
            for old in sorted(self.folder.glob("iter_*"))[: -self.keep]:
                if old.name < final.name:
                    shutil.rmtree(old, ignore_errors=True)
            logger.info("checkpoint %s is current", final.name)
        barrier()


def write_common(folder: Path) -> None:
    """Write what is not sharded, which of ours is nothing. Megatron-Core 0.16 to 0.18 load no checkpoint without this
    file; 0.19 writes none, and reads it where it is there: a checkpoint can go from one to the other."""
    stream = io.BytesIO()  # torch's own writing to a file says of a full disk nothing that can be understood
    torch.save({}, stream)
    (folder / COMMON).write_bytes(stream.getvalue())


def _own_writer_of_megatron() -> dict[str, str]:
    """From 0.17 on, `save` takes the writer of nvidia-resiliency-ext unless told otherwise. Megatron-Core does not
    require that package, and `_in_own_writer` and the results queue below are of Megatron's own."""
    choice = {"async_strategy": "mcore"}
    return choice if choice.keys() <= inspect.signature(dist_checkpointing.save).parameters.keys() else {}


def _not_written(folder: Path, error: CheckpointException) -> Exception:
    """The first failure in one line. Megatron tells it to the first rank alone."""
    if not error.failures:
        return RuntimeError(f"{folder}: a checkpoint could not be written; the log of rank 0 says why")
    rank, (reason, _) = min(error.failures.items(), key=lambda failure: failure[0])
    why, blamed = str(reason), storage_reason(reason) is not None
    if "results_queue should not be empty" in why:  # in Megatron's words: it ended without a result
        why = "its writing process was killed"
    elif "inline_container.cc" in why:  # in torch's words: a file did not take all that was written
        why, blamed = _write_error(folder), True
    text = f"{folder}: a checkpoint could not be written: rank {rank}: {why}; the one before stays current"
    return StorageError(text) if blamed else RuntimeError(text)


def _write_error(folder: Path) -> str:
    """Why a file could not be written, which torch does not pass on."""
    try:
        probe_writing(folder)
    except OSError as error:
        return error.strerror
    return "a file did not take all that was written (was the disk full?)"


def latest_checkpoint(folder: Path) -> Path | None:
    """The current checkpoint, or None before the first."""
    latest = folder / LATEST
    return folder / latest.read_text().strip() if latest.is_file() else None


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """What `Checkpointer.save` was given."""
    return read_json(checkpoint / STATE)["run"]


def load_checkpoint(checkpoint: Path, trainable: Trainable) -> None:
    """Load weights and optimizer in place, saved at whatever parallel layout."""
    model = model_state(trainable.models)
    held = optimizer_state.sharded_for_loading(trainable, model)
    loaded = dist_checkpointing.load({"model": model, "optimizer": dict(held)}, str(checkpoint))
    _load_models(trainable.models, loaded["model"])
    for name, block in held.items():
        block.data.copy_(loaded["optimizer"][name])  # of itself, unless a future Megatron loads elsewhere
    optimizer_state.set_steps(trainable, read_json(checkpoint / STATE)["optimizer_steps"])


def load_model_only(checkpoint: Path, models: list[Any]) -> None:
    """Load the weights of a checkpoint into bare models, saved at whatever parallel layout."""
    loaded = dist_checkpointing.load({"model": model_state(models)}, str(checkpoint))
    _load_models(models, loaded["model"])


def model_state(models: list[Any]) -> dict[str, Any]:
    """The sharded state dict of a rank's model chunks.

    Heads and vocabulary are padded with zeros to fit the tensor-parallel size (`ModelDims.padded_kv_heads`), so these
    tensors may be longer or shorter in the checkpoint: what is missing is zero, what is too much is zero.

    Without the state beside their weights that Transformer Engine's norms have, which only 8-bit arithmetic uses: ours
    have none, and a run may change between the two.
    """
    state = {
        str(index): {
            name: entry for name, entry in model.sharded_state_dict(prefix="").items() if not _is_norms_state(name)
        }
        for index, model in enumerate(models)
    }
    for entry in nested_values(state):
        if any(part in entry.key for part in PADDED):
            entry.allow_shape_mismatch = True
    return state


PADDED = ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias", "self_attention.linear_proj.weight")
"""Tensors padded by head. Megatron itself permits other lengths of embedding and output layer."""


def _is_norms_state(name: str) -> bool:
    return name.endswith("norm._extra_state")


def _load_models(models: list[Any], loaded: dict[str, Any]) -> None:
    """Raises RuntimeError where anything but the norms' state differs."""
    for index, model in enumerate(models):
        missing, unexpected = model.load_state_dict(loaded[str(index)], strict=False)
        wrong = [name for name in missing if not _is_norms_state(name)] + unexpected
        if wrong:
            raise RuntimeError(f"this model and its checkpoint differ in {wrong}")


def _in_own_writer(request: AsyncRequest) -> AsyncRequest:
    """The request with a writing process that dies with this one, and never starts OpenMP threads after its fork."""
    if request.async_fn is None:
        return request
    return request._replace(async_fn=functools.partial(_write, os.getpid(), request.async_fn))


def _write(trainer: int, function: Any, *arguments: Any, **keywords: Any) -> None:
    die_with(trainer)
    stopping.ignore()  # a trainer that is asked to stop needs what is being written
    writer = os.getpid()
    os.register_at_fork(after_in_child=lambda: die_with(writer))
    torch.set_num_threads(1)
    _end_with_a_killed_child()
    function(*arguments, **keywords)


def _end_with_a_killed_child() -> None:
    """Megatron never stops waiting for a process that it split the writing over and that was killed; nor would the
    trainer. It looks at this process alone, so this one must end then."""
    children: list[BaseProcess] = []  # `active_children` forgets one that ends before it is asked
    start = ForkProcess.start

    def start_and_remember(child: BaseProcess) -> None:
        start(child)
        children.append(child)

    def watch() -> None:
        while not any(child.exitcode for child in children):
            time.sleep(0.1)
        os._exit(1)

    ForkProcess.start = start_and_remember
    threading.Thread(target=watch, daemon=True).start()


_manager: SyncManager | None = None


def _use_mortal_results_queue() -> None:
    """Let writers report through a server process that dies with this one; Megatron's own would outlive a kill."""
    global _manager
    if _manager is None:
        _manager = SyncManager(ctx=get_context("spawn"))
        _manager.start(initializer=stay_until_death_of, initargs=(os.getpid(),))
        filesystem_async._results_queue = _manager.Queue()
