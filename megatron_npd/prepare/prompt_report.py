"""What `npd prompts` shows: how prompts are framed, token by token, how long they are, and what is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.config import Config, make_config
from megatron_npd.data.prompts import HELDOUT, TRAIN, PromptPart
from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import check_checkpoint
from megatron_npd.models.hf_config import eos_token_ids
from megatron_npd.prepare.prompt_checks import notes_of, overlap_of
from megatron_npd.prepare.shared_tokenizer import shared_tokenizer
from megatron_npd.prepare.tokenise import TokenisedPrompts, tokenised
from megatron_npd.roles import ANNOTATOR

BARS = 12
"""Bars of the histogram."""
WIDTH = 50
"""Columns of the longest."""
MOST_TOKENS = 400
"""Of a prompt that is shown; the middle of a longer one is left out."""


def report_on_config(config: Config, show: int) -> Iterator[str]:
    """Lines about both prompt sets of a run, `show` prompts of each way of framing.

    Raises:
        UserError: the tokenizers differ or cannot be read; see `tokenised`.
    """
    models = config.models
    teacher, student = (
        check_checkpoint(f"models.{which}", Path(folder), with_weights=False)
        for which, folder in (("teacher", models.teacher), ("student", models.student))
    )
    tokenizer = shared_tokenizer(teacher, student, models.trust_remote_code)
    splits = {split: tokenised(config, split, tokenizer, student.eos_ids) for split in (TRAIN, HELDOUT)}
    for split, prompts in splits.items():
        yield from _lines(config, f"prompts.{split}", prompts, tokenizer, show)
    overlap = overlap_of(splits[TRAIN], splits[HELDOUT])
    yield "remarks"
    remarks = [*notes_of(config, splits), *overlap.lines(splits[TRAIN], splits[HELDOUT])]
    if overlap.same:
        ours, theirs = overlap.same[0]
        remarks.append(
            f"refused: {len(overlap.same):,} held-out prompts are training prompts; the first is {ours!r} ({theirs!r})"
        )
    yield from (f"  {line}" for line in remarks or ["none: every word of every prompt is in its tokens"])


def report_on_file(path: str, folder: Path, overrides: list[str], show: int) -> Iterator[str]:
    """Lines about one data set, framed by the tokenizer of a checkpoint folder."""
    raw: dict[str, Any] = {
        "run_directory": "-",
        "models": {"teacher": str(folder), "student": str(folder)},
        "prompts": {"train": path, "heldout": path},
        ANNOTATOR: {"pack_length": 1 << 20},
        "training": {"sequence_length": 1 << 20},
    }
    config = make_config(raw, overrides, path)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.models.trust_remote_code, where=f"--tokenizer {folder}")
    if config.prompts.format == "chat" and not tokenizer.chat_template:
        raise UserError(f"--tokenizer {folder}: has no chat template; --set prompts.format=text takes prompts as text")
    prompts = tokenised(config, TRAIN, tokenizer, eos_token_ids(folder))
    yield from _lines(config, "data set", prompts, tokenizer, show)
    yield "remarks"
    remarks = list(prompts.notes.lines())
    yield from (f"  {line}" for line in remarks or ["none: every word of every prompt is in its tokens"])


def _lines(config: Config, key: str, prompts: TokenisedPrompts, tokenizer: Tokenizer, show: int) -> Iterator[str]:
    lengths = np.concatenate([part.prompts.lengths for part in prompts.parts()])
    given = f", {prompts.answered:,} with a given response" if prompts.answered else ""
    yield f"{key} = {prompts.path}: {len(lengths):,} prompts, {lengths.sum():,} tokens{given}"
    if prompts.too_long:
        what = (
            "left out" if config.prompts.too_long == "leave_out" else "refused (prompts.too_long = 'leave_out' leaves"
        )
        more = "" if config.prompts.too_long == "leave_out" else " them out)"
        yield f"  {len(prompts.too_long):,} are too long: {what}{more}; the first is {prompts.too_long[0].id!r}"
    yield from _histogram(lengths)
    yield from _examples(prompts, tokenizer, show)
    yield ""


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    """How many prompts have how many tokens."""
    width = max(1, -(-int(lengths.max()) // BARS))
    counts = np.bincount((lengths - 1) // width)
    yield "  tokens            prompts"
    for number, count in enumerate(counts.tolist()):
        bar = "█" * -(-count * WIDTH // int(counts.max()))
        yield f"  {number * width + 1:>6,} - {(number + 1) * width:<7,} {count:>9,}  {bar}".rstrip()


def _examples(prompts: TokenisedPrompts, tokenizer: Tokenizer, show: int) -> Iterator[str]:
    """The first prompts of each way of framing."""
    shown: dict[str, int] = {}
    counts: dict[str, int] = {}
    found: dict[str, list[str]] = {}
    for part in prompts.parts():
        of = part.prompts
        ends, reply_ends = np.cumsum(of.lengths), np.cumsum(of.response_lengths)
        for number, framing in enumerate(of.framings):
            rows = np.flatnonzero(of.framing == number)
            counts[framing] = counts.get(framing, 0) + len(rows)
            for row in rows[: max(0, show - shown.get(framing, 0))].tolist():
                shown[framing] = shown.get(framing, 0) + 1
                where = f"{prompts.kind} {part.numbers[row]}"
                found.setdefault(framing, []).extend(_one(of, row, ends, reply_ends, where, tokenizer))
    for framing, count in counts.items():
        yield f"  framing {framing}: {count:,} prompts"
        yield from found.get(framing, [])


def _one(
    of: PromptPart, row: int, ends: np.ndarray, reply_ends: np.ndarray, where: str, tokenizer: Tokenizer
) -> Iterator[str]:
    ids = of.ids[ends[row] - of.lengths[row] : ends[row]].tolist()
    reply = of.response_ids[reply_ends[row] - of.response_lengths[row] : reply_ends[row]].tolist()
    yield f"  ── {of.names[row]} ({where}), {len(ids)} tokens"
    yield f"     {spelled(ids, tokenizer)}"
    if reply:
        yield f"     given response, {len(reply)} tokens: {spelled(reply, tokenizer)}"


def spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    """Tokens one by one: control tokens as ⟦text id⟧, others apart by │, line breaks as ⏎."""
    if len(ids) > MOST_TOKENS:
        half = MOST_TOKENS // 2
        left, right = spelled(ids[:half], tokenizer), spelled(ids[-half:], tokenizer)
        return f"{left} … {len(ids) - 2 * half:,} tokens … {right}"
    line, after_word = "", False
    for token, text in zip(ids, tokenizer.texts([[token] for token in ids]), strict=True):
        control = text in tokenizer.control_tokens
        plain = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
        line += f"⟦{text} {token}⟧" if control else ("│" if after_word else "") + plain
        after_word = not control
    return line
