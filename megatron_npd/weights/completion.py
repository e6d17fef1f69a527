"""Making a version out of the shares all ranks wrote: index, configuration, manifest, and then its name.

Until the rename in `complete` nobody looks at the folder; after it, nothing in it changes. Runs in the background of
training on rank 0, without communication.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.files import fsync_folder, make_durable, read_json, with_file_name, write_json
from megatron_npd.models.hf_checkpoint import INDEX
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.models.tensor_map import all_hugging_face_names
from megatron_npd.process.waiting import Reminder
from megatron_npd.versions.manifest import WeightFile, write_manifest
from megatron_npd.weights.companions import copy_companions
from megatron_npd.weights.share import SHARES, read_share

POLL_SECONDS = 0.05
TIMEOUT_SECONDS = 1800.0
"""How long rank 0 waits for the others' files: as long as for a collective."""

_STAGING = re.compile(r"\.staging-v(\d{6})(-[0-9a-f]{8})?")


@dataclass(frozen=True)
class Target:
    """The version being written."""

    version: int
    staging: Path
    final: Path
    template: Path
    """Checkpoint folder whose configuration, tokenizer and generation config are carried along."""
    dims: ModelDims
    dtype: str
    """For config.json, e.g. bfloat16."""
    size: int
    """Bytes of all tensors."""
    writers: Sequence[int]
    """Ranks that write a share."""


class AlreadyPublishedError(Exception):
    """Another writer gave the version its name first."""


def complete(target: Target, stop: threading.Event) -> float:
    """Wait for every share, add what belongs to the whole, make the version visible; when, by `time.monotonic`.

    Args:
        stop: set when nobody wants the version any more.

    Raises:
        OSError: with the file's name; a TimeoutError if a share did not come.
        AlreadyPublishedError: the version exists, or its writer has removed this one's folder.
    """
    weights = _await_shares(target, stop)
    _check(target, weights)
    staging = target.staging
    with with_file_name(staging):
        weight_map = {name: file for file in sorted(weights) for name in weights[file].tensors}
        write_json(staging / INDEX, {"metadata": {"total_size": target.size}, "weight_map": weight_map})
        copy_companions(target.template, staging)
        _write_config(target)
        shutil.rmtree(staging / SHARES)
        write_manifest(staging, target.version, weights)
        make_durable(staging, already=weights.keys())
        _make_visible(target)
    seen = time.monotonic()
    _remove_leftovers(target)
    return seen


def _await_shares(target: Target, stop: threading.Event) -> dict[str, WeightFile]:
    """Every weight file that was written, by name, when all writers have said so."""
    weights: dict[str, WeightFile] = {}
    missing = sorted(target.writers)
    started, reminder = time.monotonic(), Reminder()
    while True:
        for rank in list(missing):
            if (files := read_share(target.staging, rank)) is not None:
                weights |= files
                missing.remove(rank)
        if not missing:
            return weights
        waited = time.monotonic() - started
        what = f"rank {', '.join(map(str, missing))} to write its part of version {target.version}"
        if waited > TIMEOUT_SECONDS or stop.is_set():
            raise TimeoutError(errno.ETIMEDOUT, f"waited {waited:.0f} s for {what}", str(target.staging))
        reminder.still(what)
        if not target.staging.is_dir():
            if target.final.exists():  # whoever was first has tidied up
                raise AlreadyPublishedError
            raise FileNotFoundError(errno.ENOENT, "the folder vanished while it was written", str(target.staging))
        stop.wait(POLL_SECONDS)


def _check(target: Target, weights: dict[str, WeightFile]) -> None:
    """Every tensor of the model is there once, and every file as long as its writer says."""
    names = sorted(name for file in weights.values() for name in file.tensors)
    expected = sorted(all_hugging_face_names(target.dims))
    assert names == expected, f"{target.staging}: holds {len(names)} tensors, the model has {len(expected)}"
    for name, file in weights.items():
        found = (target.staging / name).stat().st_size
        if found != file.size:
            raise OSError(errno.EIO, f"{found} bytes where {file.size} were written", str(target.staging / name))


def _write_config(target: Target) -> None:
    """The template's, which was copied, with the dtype of these weights."""
    config = read_json(target.staging / "config.json")
    config.pop("torch_dtype", None)
    write_json(target.staging / "config.json", {**config, "dtype": target.dtype})


def _make_visible(target: Target) -> None:
    try:
        os.rename(target.staging, target.final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise AlreadyPublishedError from None
        raise
    fsync_folder(target.final.parent)


def _remove_leftovers(target: Target) -> None:
    """What killed writers of this version or older ones left behind."""
    for entry in target.final.parent.iterdir():
        found = _STAGING.fullmatch(entry.name)
        if found and int(found.group(1)) <= target.version:
            shutil.rmtree(entry, ignore_errors=True)
