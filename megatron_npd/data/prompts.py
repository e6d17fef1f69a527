"""Tokenised prompt sets: written once, memory-mapped by every role. A million prompts must be cheap.

A folder holds `ids.npy` (int32, all prompts one after another), `offsets.npy` (int64 [n + 1]) and `names.txt` (one
prompt id a line).
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

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


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


def save_prompt_set(folder: Path, names: list[str], token_ids: list[list[int]]) -> None:
    """Write a tokenised prompt set; `names.txt` comes last and marks it complete."""
    offsets = np.zeros(len(token_ids) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in token_ids], out=offsets[1:])
    flat = np.fromiter((i for ids in token_ids for i in ids), dtype=np.int32, count=int(offsets[-1]))
    for name, array in (("ids.npy", flat), ("offsets.npy", offsets)):
        write_atomically(folder / name, _npy_bytes(array))
    write_atomically(folder / "names.txt", "\n".join(names).encode())


def load_prompt_set(folder: Path) -> PromptSet:
    """Memory-map a tokenised prompt set."""
    names = (folder / "names.txt").read_text(encoding="utf-8").split("\n")
    ids = np.load(folder / "ids.npy", mmap_mode="r")
    return PromptSet(ids, np.load(folder / "offsets.npy", mmap_mode="r"), names)


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
