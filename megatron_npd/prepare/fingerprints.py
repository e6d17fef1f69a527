"""What a run's inputs are, so that none is exchanged under it: recorded when it is prepared, compared at each start.

Small files of a checkpoint count by their content; a weight file by its size, its header and samples of its bytes, some
evenly over it and one of each tensor, which takes milliseconds and finds another training step, another rounding,
another model, a tensor from elsewhere. Times of files do not count.

`prepare` compares all inputs at each start. A role, which may be started by hand and often, compares teacher and
student alone: the prompts it reads are those in the run directory.
"""

from __future__ import annotations

import hashlib
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_npd.config import Config
from megatron_npd.data.rows import HUB
from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import weight_files
from megatron_npd.safetensors_format import read_header

SMALL_FILES = (".json", ".model", ".jinja", ".txt", ".py", ".tiktoken", ".vocab", ".bpe")
"""Endings of files of a checkpoint that have a say in what it computes, beside its weights."""
BLOCK = 1 << 16
"""Bytes of a sample."""
SAMPLES = 64
"""Blocks of a weight file that are read, evenly over it."""
OF_TENSOR = 1 << 12
"""Bytes that are read in the middle of each tensor besides."""
PASSING = ("cache-*.arrow", ".nfs*", ".DS_Store")
"""Files that come and go in the folder of a data set as it is looked at: no content of its own."""

Fingerprints = dict[str, Any]
"""Configuration key -> file name -> fingerprint, or for prompts one fingerprint."""


def fingerprints_of(config: Config) -> Fingerprints:
    """Of every input; what is not there, or on the hub, is left out."""
    found: Fingerprints = models_of(config)
    for key, path in (("prompts.train", config.prompts.train), ("prompts.heldout", config.prompts.heldout)):
        if not path.startswith(HUB) and Path(path).exists():
            found[key] = fingerprint_of_path(Path(path))
    return found


def models_of(config: Config) -> Fingerprints:
    """Of teacher and student alone."""
    models = {"models.teacher": config.models.teacher, "models.student": config.models.student}
    return {key: _of_checkpoint(Path(folder)) for key, folder in models.items() if Path(folder).is_dir()}


def refuse_changed(recorded: Fingerprints, now: Fingerprints, config: Config, run: Path) -> None:
    """Refuse inputs that are not those of the run. What is gone is no other input: whoever needs it will say so.

    Raises:
        UserError: the first one that changed, with its key and file.
    """
    places = {
        "models.teacher": config.models.teacher,
        "models.student": config.models.student,
        "prompts.train": config.prompts.train,
        "prompts.heldout": config.prompts.heldout,
    }
    for key in (key for key in places if key in now and key in recorded):
        if what := _difference(recorded[key], now[key]):
            raise UserError(
                f"{key} = {places[key]}: {what} since {run} was prepared; a run has one teacher, one student and one "
                "set of prompts: put it back, or use another run_directory"
            )


def fingerprint_of_path(path: Path) -> str:
    """SHA-256 of a file's content, or of all files of a folder with their names, but for what readers leave there.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in _content(path) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(path)} {file.stat().st_size} ".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _content(folder: Path) -> list[Path]:
    """The files of a data set."""
    found = (file for file in folder.rglob("*") if not any(fnmatch(file.name, pattern) for pattern in PASSING))
    return sorted(file for file in found if file.is_file())


def _difference(old: Any, new: Any) -> str | None:
    if old == new:
        return None
    if not isinstance(old, dict) or not isinstance(new, dict):
        return "its content changed"
    name = min(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return f"{name} " + ("was added" if name not in old else "was removed" if name not in new else "was changed")


def _of_checkpoint(folder: Path) -> dict[str, str]:
    small = {file.name: fingerprint_of_path(file) for file in folder.iterdir() if file.suffix in SMALL_FILES}
    try:
        weights = weight_files(folder)
    except UserError:  # none, or not all of them: whoever needs them says so
        weights = []
    return dict(sorted((small | {file.name: _of_weights(file) for file in weights}).items()))


def _of_weights(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb", buffering=0) as stream:
        header = min(8 + int.from_bytes(stream.read(8), "little"), size)
        digest.update(os.pread(stream.fileno(), header, 0))
        last = max(size - BLOCK, header)
        for start in sorted({header + (last - header) * number // (SAMPLES - 1) for number in range(SAMPLES)}):
            digest.update(os.pread(stream.fileno(), BLOCK, start))
        for begin, end in _tensors(file):
            taken = min(OF_TENSOR, end - begin)
            digest.update(os.pread(stream.fileno(), taken, (begin + end - taken) // 2))
    return digest.hexdigest()


def _tensors(file: Path) -> list[tuple[int, int]]:
    """Where the tensors of a file begin and end; of a damaged one none, for whoever loads it refuses it."""
    try:
        return sorted((stored.begin, stored.end) for stored in read_header(file).tensors.values())
    except (OSError, ValueError):
        return []
