"""Prompts, tokenised and checked before anything starts: streamed, in parallel, once.

Rows are read in batches; each becomes a part (`prepare.prompt_parts`), made by a process of its own where there are
many, and kept in the user's cache under a name that stands for all it depends on: content, tokenizer, configuration,
our code. So `npd check` and `npd prepare` tokenise once, and an interrupted command goes on where it was.
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
from typing import Any, NamedTuple

import numpy as np

from megatron_npd import data, models
from megatron_npd.cache import CACHE_VARIABLE, cache_folder
from megatron_npd.config import Config
from megatron_npd.data.framing import Framer, Notes
from megatron_npd.data.prompt_rows import RowReader
from megatron_npd.data.prompts import TRAIN, PromptPart, part_rows, write_prompt_set
from megatron_npd.data.rows import RowBatch, Rows, open_rows, place_of
from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.errors import UserError, storage_reason
from megatron_npd.files import read_json, write_json
from megatron_npd.hardware.host import cores
from megatron_npd.prepare import prompt_parts
from megatron_npd.prepare.fingerprints import SMALL_FILES, fingerprint_of_path
from megatron_npd.prepare.prompt_parts import DamagedPartError, TokenisedPart, load_part, save_part, tokenise_part
from megatron_npd.process.parent_death import die_with

logger = logging.getLogger(__name__)

BATCH = 5000
"""Rows of a part."""
ALONE = 2
"""So many parts are made in this process: another takes seconds to start."""
KEPT_DAYS = 30.0
"""A cached data set that nobody asked for in so long is removed."""


class TooLong(NamedTuple):
    """A prompt of more tokens than are allowed, or with such a given response."""

    id: str
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class TokenisedPrompts:
    """A data set after the chat template, checked; its parts lie in files."""

    path: str
    kind: str
    files: list[Path]
    max_prompt_tokens: int
    max_response_tokens: int
    lengths: np.ndarray
    """int64 [n], tokens of each prompt that is used."""
    answered: int
    """Prompts of these that have a given response."""
    too_long: list[TooLong]
    """Those that are left out, or because of which nothing starts."""
    notes: Notes

    def __len__(self) -> int:
        return len(self.lengths)

    def __str__(self) -> str:
        given = f", {self.answered:,} with a given response" if self.answered else ""
        out = f"; {len(self.too_long):,} too long, left out" if self.too_long else ""
        return f"{len(self)} prompts, {self.lengths.sum()} tokens, the longest {self.lengths.max()}{given}{out}"

    def parts(self) -> Iterator[TokenisedPart]:
        """What there is, part by part, prompts that are left out included."""
        return map(load_part, self.files)

    def save(self, folder: Path, with_responses: bool) -> None:
        """Write the prompt set of a run; `with_responses`: given responses as well."""
        write_prompt_set(folder, (self._used(part.prompts, with_responses) for part in self.parts()))
        if self.too_long:
            write_json(folder / "left_out.json", [one._asdict() for one in self.too_long])

    def _used(self, part: PromptPart, with_responses: bool) -> PromptPart:
        used = part_rows(part, ~_too_long(part, self.max_prompt_tokens, self.max_response_tokens))
        if with_responses:
            return used
        nothing = np.zeros(0, np.int32), np.zeros(len(used.names), np.int64)
        return PromptPart(used.names, used.ids, used.lengths, *nothing, used.framing, used.framings)


def tokenised(config: Config, split: str, tokenizer: Tokenizer, end_ids: list[int]) -> TokenisedPrompts:
    """Read and tokenise the training or the held-out prompts of a run.

    Args:
        tokenizer: the student's.
        end_ids: tokens that end a response.

    Raises:
        UserError: a broken file or row, no row at all, an id that comes twice, or a prompt the chat template refuses.
    """
    path = getattr(config.prompts, split)
    rows = open_rows(path, trust_code=config.models.trust_remote_code)
    work = _Work.of(config, path, rows, end_ids)
    folder = _store() / work.key
    limit = config.rollout.max_new_tokens if split == TRAIN and config.trains_on_given else sys.maxsize
    limits = config.prompts.max_prompt_tokens, limit
    try:
        return _looked_through(path, rows.kind, _make_parts(work, rows, folder, tokenizer), *limits)
    except DamagedPartError as error:
        logger.warning("%s; tokenising %s again", error, path)
        shutil.rmtree(folder)
    return _looked_through(path, rows.kind, _make_parts(work, rows, folder, tokenizer), *limits)


@dataclass(frozen=True)
class _Work:
    """All that the parts of a data set depend on; crosses to other processes."""

    config: Config
    path: str
    kind: str
    columns: list[str] | None
    end_ids: list[int]
    key: str

    @classmethod
    def of(cls, config: Config, path: str, rows: Rows, end_ids: list[int]) -> _Work:
        framing = config.prompts.model_dump(exclude={"train", "heldout", "max_prompt_tokens", "too_long"})
        student = Path(config.models.student)
        depends_on = {
            "content": getattr(rows, "fingerprint", None) or fingerprint_of_path(Path(path)),
            "named": path,
            "prompts": framing,
            "tokenizer": [_hash_of_tokenizer(student), config.models.trust_remote_code, end_ids],
            "code": _hash_of_code(),
            "batch": BATCH,
        }
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return cls(config, path, rows.kind, rows.columns, end_ids, key)

    def tools(self, tokenizer: Tokenizer) -> tuple[RowReader, Framer]:
        """What makes parts."""
        reader = RowReader(self.path, self.kind, self.columns, self.config.prompts)
        return reader, Framer(tokenizer, self.config.prompts.format, self.end_ids)


def _make_parts(work: _Work, rows: Rows, folder: Path, tokenizer: Tokenizer) -> list[Path]:
    """The files of all parts; those that are there already are not made again."""
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


def _in_parallel(work: _Work, batches: Iterator[tuple[int, RowBatch]], folder: Path) -> Iterator[tuple[Path, int]]:
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


_worker: tuple[_Work, RowReader, Framer] | None = None
"""In a worker: what it makes parts with."""


def _begin_worker(work: _Work, parent: int) -> None:
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


def _looked_through(
    path: str, kind: str, files: list[Path], max_prompt_tokens: int, max_response_tokens: int
) -> TokenisedPrompts:
    """What a data set holds as a whole."""
    notes, lengths, answered = Notes(), [], 0
    too_long: list[TooLong] = []
    seen: dict[str, int] = {}
    for part in map(load_part, files):
        prompts = part.prompts
        _check_names(path, kind, prompts.names, part.numbers, seen)
        out = _too_long(prompts, max_prompt_tokens, max_response_tokens)
        for row in np.flatnonzero(out).tolist():
            too_long.append(
                TooLong(prompts.names[row], *(int(x[row]) for x in (prompts.lengths, prompts.response_lengths)))
            )
        lengths.append(prompts.lengths[~out])
        answered += int(np.count_nonzero(prompts.response_lengths[~out]))
        notes.merge(part.notes)
    if not seen:
        raise UserError(f"{path}: no prompts; must hold at least one")
    used = np.concatenate(lengths)
    return TokenisedPrompts(path, kind, files, max_prompt_tokens, max_response_tokens, used, answered, too_long, notes)


def _too_long(part: PromptPart, max_prompt_tokens: int, max_response_tokens: int) -> np.ndarray:
    """bool [n]: prompts of more tokens than are allowed, or with such a response."""
    return (part.lengths > max_prompt_tokens) | (part.response_lengths > max_response_tokens)


def _check_names(path: str, kind: str, names: list[str], numbers: np.ndarray, seen: dict[str, int]) -> None:
    for name, number in zip(names, numbers.tolist(), strict=True):
        if name in seen:
            where = place_of(path, kind, number)
            raise UserError(f"{where}: id {name!r} was already used on {kind} {seen[name]}; ids must be unique")
        seen[name] = number


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
