"""A folder that appears complete, and the work on it that a kill only interrupts.

It is written as `.staging-NAME` beside its place. `job.json` in it says of what input and with which options it is
made; the same command goes on where the last one stopped, another one is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError
from megatron_npd.files import fsync_folder, make_durable, read_json, write_json

JOB, LOCK = "job.json", "lock"
_MARKS = ("config.json", "metadata.json")
"""One of these is in every output."""
_HASHED_BYTES = 2**20
_SPARE_BYTES = 2**24


def identity(files: Iterable[Path]) -> dict[str, list[Any]]:
    """File name -> size, modification time and hash of the beginning (a safetensors header): enough to tell inputs
    apart without reading them whole."""
    found: dict[str, list[Any]] = {}
    for file in files:
        with open(file, "rb") as stream:
            beginning = hashlib.sha256(stream.read(_HASHED_BYTES)).hexdigest()
        found[file.name] = [file.stat().st_size, file.stat().st_mtime_ns, beginning]
    return found


@contextlib.contextmanager
def staged(
    output: Path,
    inputs: Sequence[Path],
    job: dict[str, Any],
    overwrite: bool,
    nbytes: int,
    check: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """The folder to work in; it becomes `output` when the block ends without an exception.

    Args:
        inputs: folders that must not be replaced.
        job: JSON that describes the input and the options.
        overwrite: replace a complete output, and drop an interrupted one of another job.
        nbytes: about as many will be written.
        check: called when it is clear that they can be, before anything is: what it raises leaves nothing behind.

    Raises:
        UserError: the output is there, or an interrupted other job, or another process at work, or too little space.
    """
    staging = output.with_name(f".staging-{output.name}")
    _check_output(output, inputs, overwrite)
    _check_space(staging, nbytes)
    check()
    staging.mkdir(parents=True, exist_ok=True)
    with open(staging / LOCK, "w") as lock:
        _take(lock.fileno(), staging)
        _enter(staging, output, json.loads(json.dumps(job)), overwrite)
        yield staging
        (staging / JOB).unlink()
        (staging / LOCK).unlink()
        make_durable(staging)
        _replace(staging, output)


def _check_output(output: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; must be the name of a folder to make")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: is there already; --overwrite replaces it")
    if not any((output / name).is_file() for name in _MARKS):
        raise UserError(f"{output}: is no checkpoint (holds none of {', '.join(_MARKS)}); only one is overwritten")
    for folder in inputs:
        if output.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UserError(f"{output}: holds the input {folder}; must be another folder")


def _take(descriptor: int, staging: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{staging}: another process is working in it; wait for it to end") from None
    except OSError:
        pass  # a filesystem without locks


def _enter(staging: Path, output: Path, job: dict[str, Any], overwrite: bool) -> None:
    """Go on with the same job, or begin."""
    try:
        begun = read_json(staging / JOB) if (staging / JOB).is_file() else None
    except ValueError:
        begun = {}
    if begun is not None and begun != job:
        if not overwrite:
            differing = ", ".join(key for key in job if begun.get(key) != job[key])
            raise UserError(
                f"{output}: a conversion with other {differing} was interrupted here; repeat that one, or drop it with "
                "--overwrite"
            )
        begun = None
    if begun is None:
        for entry in staging.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
        write_json(staging / JOB, job)


def _check_space(staging: Path, nbytes: int) -> None:
    there = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    filesystem = next(folder for folder in staging.resolve().parents if folder.is_dir())
    wanted, free = nbytes + _SPARE_BYTES - there, shutil.disk_usage(filesystem).free
    if wanted > free:
        raise UserError(f"{filesystem}: {free / 1e9:.2f} GB free; must be at least {wanted / 1e9:.2f} GB")


def _replace(staging: Path, output: Path) -> None:
    old = output.with_name(f".old-{output.name}")
    if output.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(output, old)
    os.rename(staging, output)
    fsync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)
