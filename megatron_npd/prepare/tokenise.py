"""A data set of prompts, tokenised: what is there, how long it is, and what must be said about it.

Rows are read in batches, each of which becomes a part (`prepare.prompt_parts`); `prepare.part_maker` makes them. What
concerns all prompts together is looked at here, part by part.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_npd.config import Config
from megatron_npd.data.framing import Notes
from megatron_npd.data.prompts import TRAIN, PromptPart, part_rows, write_prompt_set
from megatron_npd.data.rows import open_rows, place_of
from megatron_npd.data.tokenizer import Tokenizer
from megatron_npd.errors import UserError
from megatron_npd.files import write_json
from megatron_npd.prepare.part_maker import PartWork, make_parts
from megatron_npd.prepare.prompt_parts import DamagedPartError, TokenisedPart, load_part

logger = logging.getLogger(__name__)


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
    work = PartWork.of(config, path, rows, end_ids)
    uses_given = config.trains_on_given if split == TRAIN else config.heldout.source == "data"
    limit = config.rollout.max_new_tokens if uses_given else sys.maxsize
    limits = config.prompts.max_prompt_tokens, limit
    try:
        return _looked_through(path, rows.kind, make_parts(work, rows, tokenizer), *limits)
    except DamagedPartError as error:
        logger.warning("%s; tokenising %s again", error, path)
        shutil.rmtree(work.folder)
    return _looked_through(path, rows.kind, make_parts(work, rows, tokenizer), *limits)


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
