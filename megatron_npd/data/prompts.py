"""Tokenised prompt sets: written once, memory-mapped by every role. A million prompts must be cheap.

A folder holds `ids.npy` (int32, all prompts one after another), `offsets.npy` (int64 [n + 1]) and `names.txt` (one
prompt id a line). Where the user's data has responses to some of the prompts, `response_ids.npy` and
`response_offsets.npy` hold them alike: a prompt without a given response has an empty one. `framings.json` lists the
ways in which prompts were framed, `framing.npy` (int32 [n]) says which prompt was framed how.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.files import fill_atomically, read_json, write_json

TRAIN, HELDOUT = SPLITS = ("train", "heldout")
"""The prompt sets of a run."""

NAMES = "names.txt"


@dataclass(frozen=True)
class PromptSet:
    """Token ids of n prompts, chat template applied."""

    folder: Path
    ids: np.ndarray
    offsets: np.ndarray
    response_ids: np.ndarray | None = None
    """int32: the responses that the data gives, each with its end token, one after another; None: none at all."""
    response_offsets: np.ndarray | None = None
    """int64 [n + 1]."""
    framing: np.ndarray | None = None
    """int32 [n], which of `framings` a prompt has; None: there is one, or none is recorded."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def names(self) -> list[str]:
        """The ids the user gave them. Read when first asked for: few roles do, and there may be millions."""
        return (self.folder / NAMES).read_text(encoding="utf-8").split("\n")

    @cached_property
    def framings(self) -> list[dict[str, Any]]:
        """How prompts were framed (`data.framing.Framer.describe`); empty where it was not recorded."""
        path = self.folder / "framings.json"
        return read_json(path) if path.is_file() else []

    def framings_of(self, indices: np.ndarray) -> list[dict[str, Any]]:
        """How these prompts were framed, each way once, with the number of `prompts` that have it."""
        which = np.zeros(len(indices), np.int64) if self.framing is None else self.framing[indices]
        found, counts = np.unique(which, return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        return [self.framings[number] | {"prompts": count} for number, count in pairs] if self.framings else []

    def response(self, index: int) -> np.ndarray:
        """The given response to a prompt, int32 [R]; empty where there is none."""
        if self.response_ids is None or self.response_offsets is None:
            return np.zeros(0, np.int32)
        return self.response_ids[self.response_offsets[index] : self.response_offsets[index + 1]]

    @property
    def answered(self) -> np.ndarray:
        """Prompts that have a given response, int64, ascending."""
        if self.response_offsets is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.diff(self.response_offsets))


@dataclass(frozen=True)
class PromptPart:
    """Some successive prompts of a set that is being written."""

    names: list[str]
    ids: np.ndarray
    """int32, one after another."""
    lengths: np.ndarray
    """int64 [n]."""
    response_ids: np.ndarray
    response_lengths: np.ndarray
    """int64 [n], 0 for a prompt without a given response."""
    framing: np.ndarray
    """int32 [n], place in `framings`."""
    framings: list[str]
    """JSON of each way of framing."""


@dataclass
class _Column:
    """Lengths of a ragged column's rows, part by part."""

    lengths: list[np.ndarray] = field(default_factory=list)

    def offsets(self) -> np.ndarray:
        return np.concatenate([np.zeros(1, np.int64), *self.lengths]).cumsum()


def write_prompt_set(folder: Path, parts: Iterable[PromptPart]) -> None:
    """Write a tokenised prompt set part by part; `names.txt` comes last and marks it complete."""
    prompts, responses = _Column(), _Column()
    framings: dict[str, int] = {}
    framing: list[np.ndarray] = []
    raw = {name: folder / f".{name}.raw.tmp" for name in ("ids", "response_ids", "names")}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            open(raw["ids"], "wb") as ids,
            open(raw["response_ids"], "wb") as replies,
            open(raw["names"], "wb") as names,
        ):
            for part in (part for part in parts if part.names):
                names.write(b"\n" * bool(framing) + "\n".join(part.names).encode())
                ids.write(np.ascontiguousarray(part.ids, np.int32))
                replies.write(np.ascontiguousarray(part.response_ids, np.int32))
                prompts.lengths.append(part.lengths)
                responses.lengths.append(part.response_lengths)
                places = [framings.setdefault(text, len(framings)) for text in part.framings]
                framing.append(np.array(places, np.int32)[part.framing] if places else part.framing)
        _write_ragged(folder, "ids", "offsets", raw["ids"], prompts.offsets())
        if (offsets := responses.offsets())[-1]:
            _write_ragged(folder, "response_ids", "response_offsets", raw["response_ids"], offsets)
        write_json(folder / "framings.json", [json.loads(text) for text in framings])
        if len(framings) > 1:
            _write_array(folder / "framing.npy", np.concatenate(framing))
        fill_atomically(folder / NAMES, lambda path: _copy(raw["names"], path))
    finally:
        for path in raw.values():
            path.unlink(missing_ok=True)


def save_prompt_set(
    folder: Path, names: list[str], token_ids: list[list[int]], responses: list[list[int]] | None = None
) -> None:
    """Write a tokenised prompt set that is in memory.

    `responses`: given ones, each with its end token, [] for a prompt that has none.
    """
    replies = responses or [[] for _ in names]
    whole = PromptPart(names, *_flat(token_ids), *_flat(replies), np.zeros(len(names), np.int32), [])
    write_prompt_set(folder, [whole])


def load_prompt_set(folder: Path) -> PromptSet:
    """Memory-map a tokenised prompt set.

    Raises:
        OSError, ValueError: it is not there, not whole, or not readable.
    """
    (folder / NAMES).stat()
    ids, offsets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "offsets"))
    optional = (
        np.load(path, mmap_mode="r") if (path := folder / f"{name}.npy").is_file() else None
        for name in ("response_ids", "response_offsets", "framing")
    )
    return PromptSet(folder, ids, offsets, *optional)


def part_rows(part: PromptPart, kept: np.ndarray) -> PromptPart:
    """Some prompts of a part; `kept` bool [n]."""
    return PromptPart(
        [name for name, keep in zip(part.names, kept, strict=True) if keep],
        part.ids[np.repeat(kept, part.lengths)],
        part.lengths[kept],
        part.response_ids[np.repeat(kept, part.response_lengths)],
        part.response_lengths[kept],
        part.framing[kept],
        part.framings,
    )


def _flat(ragged: list[list[int]]) -> Iterator[np.ndarray]:
    """Values int32 and lengths int64 of a ragged list."""
    lengths = np.array([len(ids) for ids in ragged], dtype=np.int64)
    yield np.fromiter((i for ids in ragged for i in ids), dtype=np.int32, count=int(lengths.sum()))
    yield lengths


def _write_ragged(folder: Path, values: str, offsets: str, raw: Path, bounds: np.ndarray) -> None:
    def write(path: Path) -> None:
        with open(path, "wb") as stream:
            header = {"descr": np.dtype(np.int32).str, "fortran_order": False, "shape": (int(bounds[-1]),)}
            np.lib.format.write_array_header_1_0(stream, header)
        _copy(raw, path)

    fill_atomically(folder / f"{values}.npy", write)
    _write_array(folder / f"{offsets}.npy", bounds)


def _write_array(path: Path, array: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            np.save(stream, array)

    fill_atomically(path, write)


def _copy(source: Path, target: Path) -> None:
    """Append one file to another."""
    with open(source, "rb") as whence, open(target, "ab") as whither:
        shutil.copyfileobj(whence, whither, 1 << 20)
