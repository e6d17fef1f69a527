"""What must hold of the prompts of a run as a whole: none too long, none held out and trained on."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from megatron_npd.config import Config
from megatron_npd.data.prompts import HELDOUT, SPLITS, TRAIN
from megatron_npd.data.tokenizer import Tokenizer
from megatron_npd.errors import UserError
from megatron_npd.prepare.tokenise import TokenisedPrompts, tokenised

logger = logging.getLogger(__name__)


def checked_splits(config: Config, tokenizer: Tokenizer, end_ids: list[int]) -> dict[str, TokenisedPrompts]:
    """The training and the held-out prompts of a run, tokenised; says what is worth saying about them.

    Raises:
        UserError: see `tokenised`; a prompt that is too long, where that is not to be left out; one in both sets.
    """
    splits = {split: tokenised(config, split, tokenizer, end_ids) for split in SPLITS}
    train, heldout = splits[TRAIN], splits[HELDOUT]
    overlap = overlap_of(train, heldout)
    if overlap.same:
        ours, theirs = overlap.same[0]
        more = f" ({len(overlap.same)} such prompts)" if overlap.same[1:] else ""
        raise UserError(
            f"{heldout.path}: prompt {ours!r} has the text of prompt {theirs!r} in {train.path}; held-out prompts must "
            f"not be trained on{more}"
        )
    for prompts in splits.values():
        if prompts.too_long:
            _judge_length(config, prompts)
    for line in [*notes_of(config, splits), *overlap.lines(train, heldout)]:
        logger.warning(line)
    return splits


def notes_of(config: Config, splits: dict[str, TokenisedPrompts]) -> list[str]:
    """What framing found, and what is there and not used; for people."""
    lines = [f"{prompts.path}: {line}" for prompts in splits.values() for line in prompts.notes.lines()]
    for split, prompts in splits.items():
        used = config.trains_on_given if split == TRAIN else config.heldout.source == "data"
        if prompts.answered and not used:
            why = (
                "of held-out prompts the teacher's are: see heldout.source"
                if split == HELDOUT
                else "see warmup.source, rounds.given_share"
            )
            lines.append(f"{prompts.path}: {prompts.answered:,} given responses are not used ({why})")
    return lines


@dataclass(frozen=True)
class Overlap:
    """Prompts that say the same."""

    same: list[tuple[str, str]]
    """(held-out, training) prompt, to the letter."""
    alike: list[str]
    """Held-out prompts that differ from a training prompt in case, spaces or a last stop alone."""
    repeated: dict[str, tuple[int, str]]
    """Split -> how many of its prompts repeat another in this sense, and one that is repeated most."""

    def lines(self, train: TokenisedPrompts, heldout: TokenisedPrompts) -> list[str]:
        """What is not a fault, but to be known."""
        lines = []
        if self.alike:
            lines.append(
                f"{heldout.path}: {len(self.alike):,} prompts differ from one in {train.path} in case, spaces or a "
                f"last stop alone; the first is {self.alike[0]!r}"
            )
        for split, prompts in ((TRAIN, train), (HELDOUT, heldout)):
            count, example = self.repeated[split]
            if count:
                lines.append(f"{prompts.path}: {count:,} prompts repeat another; most often {example!r} is repeated")
        return lines


def overlap_of(train: TokenisedPrompts, heldout: TokenisedPrompts) -> Overlap:
    """Compare two sets, those left out included."""
    of = {split: _Said.of(prompts) for split, prompts in ((TRAIN, train), (HELDOUT, heldout))}
    ours, theirs = of[HELDOUT], of[TRAIN]
    same = np.flatnonzero(np.isin(ours.said, theirs.said)).tolist()
    alike = np.flatnonzero(np.isin(ours.meant, theirs.meant) & ~np.isin(ours.said, theirs.said)).tolist()
    return Overlap(
        [(ours.names[place], theirs.names[int(np.argmax(theirs.said == ours.said[place]))]) for place in same],
        [ours.names[place] for place in alike],
        {split: said.repeated() for split, said in of.items()},
    )


@dataclass(frozen=True)
class _Said:
    """Names and hashes of a set's prompts (`prompt_parts.TokenisedPart`)."""

    names: list[str]
    said: np.ndarray
    meant: np.ndarray

    @classmethod
    def of(cls, prompts: TokenisedPrompts) -> _Said:
        parts = list(prompts.parts())
        names = [name for part in parts for name in part.prompts.names]
        return cls(names, *(np.concatenate([getattr(part, which) for part in parts]) for which in ("said", "meant")))

    def repeated(self) -> tuple[int, str]:
        values, first, counts = np.unique(self.meant, return_index=True, return_counts=True)
        return len(self.meant) - len(values), self.names[first[np.argmax(counts)]]


def _judge_length(config: Config, prompts: TokenisedPrompts) -> None:
    """Refuse a set with prompts that are too long, or say that they are left out."""
    first, count = prompts.too_long[0], len(prompts.too_long)
    over = first.prompt_tokens > prompts.max_prompt_tokens
    what, tokens = ("", first.prompt_tokens) if over else ("'s given response", first.response_tokens)
    rule = (
        f"prompts.max_prompt_tokens = {prompts.max_prompt_tokens}"
        if over
        else f"rollout.max_new_tokens = {prompts.max_response_tokens}"
    )
    if config.prompts.too_long == "refuse":
        longest = max(one.prompt_tokens if over else one.response_tokens for one in prompts.too_long)
        more = f" ({count} such prompts, the longest {longest})" if count > 1 else ""
        raise UserError(
            f"{prompts.path}: prompt {first.id!r}{what} has {tokens} tokens; must not exceed {rule}{more}; "
            "prompts.too_long = 'leave_out' leaves such out"
        )
    if not len(prompts):
        raise UserError(f"{prompts.path}: all {count} prompts are too long ({rule}); at least one must not be")
    logger.warning(
        "%s: %d prompts are left out, for they are longer than %s; the first is %r with %d tokens (left_out.json in "
        "the run directory lists all)", prompts.path, count, rule, first.id, tokens,
    )  # fmt: skip
