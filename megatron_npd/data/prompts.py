"""Tokenised prompt sets: written once, memory-mapped by every role. A million prompts must be cheap.

A folder holds `ids.npy` (int32, all prompts one after another), `offsets.npy` (int64 [n + 1]) and `names.txt` (one
prompt id a line). Where the user's data has responses to some of the prompts, `response_ids.npy` and
`response_offsets.npy` hold them alike: a prompt without a given response has an empty one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.errors import UserError
from megatron_npd.files import write_atomically

TRAIN, HELDOUT = SPLITS = ("train", "heldout")
"""The prompt sets of a run."""
SPEAKERS = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptSet:
    """Token ids of n prompts, chat template applied; `names` are the ids the user gave them."""

    ids: np.ndarray
    offsets: np.ndarray
    names: list[str]
    response_ids: np.ndarray | None = None
    """int32: the responses that the data gives, each with its end token, one after another; None: none at all."""
    response_offsets: np.ndarray | None = None
    """int64 [n + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

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


def read_chats(path: str | Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Prompts of a JSON-lines file as (id, messages); a line without an id is named after its number.

    Raises:
        UserError: unreadable file, or a broken line (file, line number and rule are named), or no prompt at all.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read prompts: {getattr(error, 'strerror', None) or error}") from None
    chats: list[tuple[str, list[dict[str, Any]]]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, messages = _parse_line(f"{path}:{number}", line, number)
        if name in seen:
            raise UserError(f"{path}:{number}: id {name!r} was already used on line {seen[name]}; ids must be unique")
        seen[name] = number
        chats.append((name, messages))
    if not chats:
        raise UserError(f"{path}: no prompts; must hold at least one JSON line with messages")
    return chats


def save_prompt_set(
    folder: Path, names: list[str], token_ids: list[list[int]], responses: list[list[int]] | None = None
) -> None:
    """Write a tokenised prompt set; `names.txt` comes last and marks it complete.

    `responses`: given ones, each with its end token, [] for a prompt that has none.
    """
    for values, offsets, ragged in (("ids", "offsets", token_ids), ("response_ids", "response_offsets", responses)):
        if ragged is not None:
            for name, array in zip((values, offsets), _flat(ragged), strict=True):
                write_atomically(folder / f"{name}.npy", _npy_bytes(array))
    write_atomically(folder / "names.txt", "\n".join(names).encode())


def load_prompt_set(folder: Path) -> PromptSet:
    """Memory-map a tokenised prompt set."""
    names = (folder / "names.txt").read_text(encoding="utf-8").split("\n")
    ids, offsets, response_ids, response_offsets = (
        np.load(path, mmap_mode="r") if (path := folder / f"{name}.npy").is_file() else None
        for name in ("ids", "offsets", "response_ids", "response_offsets")
    )
    return PromptSet(ids, offsets, names, response_ids, response_offsets)


def _flat(ragged: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Values int32 and offsets int64 [n + 1] of a ragged list."""
    offsets = np.zeros(len(ragged) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in ragged], out=offsets[1:])
    return np.fromiter((i for ids in ragged for i in ids), dtype=np.int32, count=int(offsets[-1])), offsets


def _parse_line(where: str, line: str, number: int) -> tuple[str, list[dict[str, Any]]]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: must be an object with a non-empty list "messages"')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in SPEAKERS:
            raise UserError(f"{where}: each message needs a role, one of {', '.join(SPEAKERS)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: each message needs a string content")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last message must not be the assistant's: its reply is what is generated")
    name = str(record.get("id", f"line-{number}"))
    if "\n" in name:
        raise UserError(f"{where}: id {name!r} must not contain a line break")
    return name, messages


def _npy_bytes(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
