"""Making the parts of a data set: by several processes where there are many, once for all commands.

Parts lie in the user's cache under a name that stands for all they depend on: content, tokenizer, configuration, our
code. So `npd check` and `npd prepare` tokenise once, and an interrupted command goes on where it was.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd import data, models
from megatron_npd.cache import CACHE_VARIABLE, cache_folder
from megatron_npd.config import Config
from megatron_npd.data.framing import Framer
from megatron_npd.data.prompt_rows import RowReader
from megatron_npd.data.rows import HUB, RowBatch, Rows
from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.errors import UserError, storage_reason
from megatron_npd.files import read_json, write_json
from megatron_npd.hardware.host import cores
from megatron_npd.prepare import prompt_parts
from megatron_npd.prepare.fingerprints import SMALL_FILES, fingerprint_of_path
from megatron_npd.prepare.prompt_parts import save_part, tokenise_part
from megatron_npd.process.parent_death import die_with

logger = logging.getLogger(__name__)

BATCH = 5000
"""Rows of a part."""
ALONE = 2
"""So many parts are made in this process: another takes seconds to start."""
KEPT_DAYS = 30.0
"""A cached data set that nobody asked for in so long is removed."""


@dataclass(frozen=True)
class PartWork:
    """All that the parts of a data set depend on; crosses to other processes."""

    config: Config
    path: str
    kind: str
    columns: list[str] | None
    end_ids: list[int]
    key: str

    @classmethod
    def of(cls, config: Config, path: str, rows: Rows, end_ids: list[int]) -> PartWork:
        framing = config.prompts.model_dump(exclude={"train", "heldout", "max_prompt_tokens", "too_long"})
        student = Path(config.models.student)
        depends_on = {
            "content": getattr(rows, "fingerprint", "") if path.startswith(HUB) else fingerprint_of_path(Path(path)),
            "named": path,
            "prompts": framing,
            "tokenizer": [_hash_of_tokenizer(student), config.models.trust_remote_code, end_ids],
            "code": _hash_of_code(),
            "batch": BATCH,
        }
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return cls(config, path, rows.kind, rows.columns, end_ids, key)

    @property
    def folder(self) -> Path:
        """Where the parts lie."""
        return _store() / self.key

    def tools(self, tokenizer: Tokenizer) -> tuple[RowReader, Framer]:
        """What makes parts."""
        reader = RowReader(self.path, self.kind, self.columns, self.config.prompts)
        return reader, Framer(tokenizer, self.config.prompts.format, self.end_ids)


def make_parts(work: PartWork, rows: Rows, tokenizer: Tokenizer) -> list[Path]:
    """The files of all parts; those that are there already are not made again.

    Raises:
        UserError: the first row that breaks a rule.
    """
    folder = work.folder
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    done = folder / "done.json"
    if done.is_file():
        files = [folder / name for name in read_json(done)]
        if all(file.is_file() for file in files):
            return files
    batches = enumerate(rows.batches(BATCH))
    first = list(islice(batches, ALONE + 1))
    reader, framer = work.tools(tokenizer)
    files = []
    bar = _Bar(work.path, counts=len(first) > ALONE)
    if len(first) <= ALONE:
        for number, batch in first:
            files.append(_part_file(folder, number))
            if not files[-1].is_file():
                save_part(files[-1], tokenise_part(work.path, work.kind, batch, reader, framer))
    else:
        for file, count in _in_parallel(work, chain(first, batches), folder):
            files.append(file)
            bar.add(count)
    bar.close()
    write_json(done, [file.name for file in files])
    return files


def _in_parallel(work: PartWork, batches: Iterator[tuple[int, RowBatch]], folder: Path) -> Iterator[tuple[Path, int]]:
    """Parts in order, made by as many processes as there are cores: file, and its rows."""
    processes = cores()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin_worker, (work, os.getpid())) as pool:
        under_way: deque[tuple[Path, int, Future[str | None] | None]] = deque()

        def finish() -> tuple[Path, int]:
            file, count, future = under_way.popleft()
            if future and (fault := future.result()):
                raise UserError(fault)
            return file, count

        try:
            for number, batch in batches:
                file = _part_file(folder, number)
                future = None if file.is_file() else pool.submit(_work_on, batch, file)
                under_way.append((file, len(batch), future))
                if len(under_way) > 2 * processes:
                    yield finish()
            while under_way:
                yield finish()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: tuple[PartWork, RowReader, Framer] | None = None
"""In a worker: what it makes parts with."""


def _begin_worker(work: PartWork, parent: int) -> None:
    global _worker  # a process pool has no other place for what its processes keep
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each has a core
    models_ = work.config.models
    tokenizer = load_tokenizer(Path(models_.student), trust_remote_code=models_.trust_remote_code)
    _worker = (work, *work.tools(tokenizer))


def _work_on(batch: RowBatch, file: Path) -> str | None:
    """Make a part; what is wrong with a row of it, if something is."""
    assert _worker is not None
    work, reader, framer = _worker
    try:
        save_part(file, tokenise_part(work.path, work.kind, batch, reader, framer))
    except UserError as error:
        return str(error)
    return None


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"part_{number:06d}.npz"


@functools.cache
def _store() -> Path:
    """Where parts are kept; a folder of this process alone where the user's cache cannot be written."""
    folder = cache_folder("prompts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _forget_old(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning(
            "%s: %s: tokenised prompts cannot be kept there: each command makes them again (%s names another folder)",
            folder, storage_reason(error) or error.strerror, CACHE_VARIABLE,
        )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="npd_prompts_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _forget_old(folder: Path) -> None:
    for entry in folder.iterdir():
        if time.time() - entry.stat().st_mtime > KEPT_DAYS * 86400:
            shutil.rmtree(entry, ignore_errors=True)


def _hash_of_tokenizer(folder: Path) -> str:
    """Of every file of a checkpoint that may have a say in its token ids: those that are no weights."""
    names = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in SMALL_FILES)
    digest = hashlib.sha256()
    for path in names:
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def _hash_of_code() -> str:
    """Of our own code that turns rows into tokens, and of the libraries that do."""
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__} {np.__version__}".encode())
    packages = [Path(str(package.__file__)).parent for package in (data, models)]
    for file in sorted([*chain.from_iterable(p.rglob("*.py") for p in packages), Path(str(prompt_parts.__file__))]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _Bar:
    """How many rows are done: a bar where a person watches, else a line now and then."""

    SECONDS = 10.0

    def __init__(self, path: str, counts: bool):
        from tqdm import tqdm

        self._path, self._rows, self._said = path, 0, time.monotonic()
        live = counts and sys.stderr.isatty()
        self._bar: Any = tqdm(desc=path, unit=" prompts", unit_scale=True) if live else None

    def add(self, rows: int) -> None:
        self._rows += rows
        if self._bar:
            self._bar.update(rows)
        elif time.monotonic() - self._said > self.SECONDS:
            self._said = time.monotonic()
            logger.info("%s: %d rows tokenised", self._path, self._rows)

    def close(self) -> None:
        if self._bar:
            self._bar.close()
