"""Some successive prompts of a data set, tokenised and kept in a file: what is worked on, cached, and gone on with.

A part is a pure function of its rows, the tokenizer and the configuration. Limits that only choose among prompts (how
long, which are used) are not applied here, so that changing them costs no tokenising.
"""

from __future__ import annotations

import io
import json
import unicodedata
import zipfile
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from megatron_npd.data.framing import Framed, Framer, Notes
from megatron_npd.data.prompt_rows import Prompt, RowReader
from megatron_npd.data.prompts import PromptPart
from megatron_npd.data.rows import RowBatch, place_of
from megatron_npd.errors import UserError
from megatron_npd.files import write_atomically


class DamagedPartError(ValueError):
    """A part that cannot be read back; it must be made again."""


@dataclass(frozen=True)
class TokenisedPart:
    """Tokenised prompts, where they came from, and what is to be said about them."""

    prompts: PromptPart
    numbers: np.ndarray
    """int64 [n], number of the row of each."""
    said: np.ndarray
    """uint64 [n], hash of what is said in each, to the letter."""
    meant: np.ndarray
    """uint64 [n], the same of normalised words (`normalised`)."""
    notes: Notes


def tokenise_part(path: str, kind: str, batch: RowBatch, reader: RowReader, framer: Framer) -> TokenisedPart:
    """Tokenise a batch of rows.

    Args:
        path: of the data set, as messages name it; `kind`: what its numbers count.

    Raises:
        UserError: the first row that breaks a rule.
    """
    numbered = [(number, reader.prompt(number, row)) for number, row in batch.rows()]
    places = {id(prompt): place_of(path, kind, number) for number, prompt in numbered}

    def refuse(prompt: Prompt, what: str) -> UserError:
        return UserError(f"{places[id(prompt)]}: prompt {prompt.name!r}: {what}")

    prompts = [prompt for _, prompt in numbered]
    framed, notes = framer.frame(prompts, refuse) if prompts else ([], Notes())
    return TokenisedPart(
        part_of(prompts, framed),
        np.array([number for number, _ in numbered], np.int64),
        np.array([hash_of(prompt.words) for prompt in prompts], np.uint64),
        np.array([hash_of(normalised(prompt.words)) for prompt in prompts], np.uint64),
        notes,
    )


def save_part(path: Path, part: TokenisedPart) -> None:
    """Keep a part in a file, whole or not at all."""
    prompts, buffer = part.prompts, io.BytesIO()
    words = {"names": prompts.names, "framings": prompts.framings, "notes": part.notes.found}
    np.savez(
        buffer,
        ids=prompts.ids,
        lengths=prompts.lengths,
        response_ids=prompts.response_ids,
        response_lengths=prompts.response_lengths,
        framing=prompts.framing,
        numbers=part.numbers,
        said=part.said,
        meant=part.meant,
        words=np.frombuffer(json.dumps(words).encode(), np.uint8),
    )
    write_atomically(path, buffer.getvalue())


def load_part(path: Path) -> TokenisedPart:
    """Read a part back.

    Raises:
        DamagedPartError: it is not there, or not what was written.
    """
    try:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        words = json.loads(arrays["words"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedPartError(f"{path}: damaged ({error})") from None
    columns = (arrays[name] for name in ("ids", "lengths", "response_ids", "response_lengths", "framing"))
    notes = Notes({what: (count, example) for what, (count, example) in words["notes"].items()})
    prompts = PromptPart(words["names"], *columns, words["framings"])
    return TokenisedPart(prompts, arrays["numbers"], arrays["said"], arrays["meant"], notes)


def part_of(prompts: list[Prompt], framed: list[Framed]) -> PromptPart:
    """Prompts and what they became, as a part of a set."""
    framings = {one.framing: number for number, one in enumerate(framed)}
    framings = {text: number for number, text in enumerate(framings)}
    return PromptPart(
        [prompt.name for prompt in prompts],
        *_flat([one.ids for one in framed]),
        *_flat([one.response_ids for one in framed]),
        np.array([framings[one.framing] for one in framed], np.int32),
        list(framings),
    )


def _flat(ragged: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Values int32 and lengths int64 of a ragged list."""
    rows = [np.array(row, np.int32) for row in ragged]
    return np.concatenate([np.zeros(0, np.int32), *rows]), np.array([len(row) for row in rows], np.int64)


def hash_of(text: str) -> int:
    """What tells texts apart, of 64 bits."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def normalised(text: str) -> str:
    """Compatible characters alike, case, spaces and a last stop aside. Other signs stay: 3 + 3 is not 3 - 3."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .?!")
