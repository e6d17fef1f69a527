"""What preflight says of a tokenizer that is usable, but not as a user may think. Warnings; nothing is refused here."""

from __future__ import annotations

import logging

from megatron_npd.data.json_tokenizer import JSON_FILE
from megatron_npd.data.round_trip import SAMPLE_TEXTS, changes, different_ids
from megatron_npd.data.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from megatron_npd.data.tokenizer import Tokenizer, auto_tokenizer, code_of
from megatron_npd.data.tokenizer_settings import read_settings
from megatron_npd.models.hf_checkpoint import Checkpoint

logger = logging.getLogger(__name__)

EXAMPLES = 3
"""Tokens that a message names at most."""


def speak_of_tokenizer(teacher: Checkpoint, student: Checkpoint, of_teacher: Tokenizer, of_student: Tokenizer) -> None:
    """Say what the tokenizers of a pair that passed `shared_tokenizer` change, lack, or mean to other programs."""
    for checkpoint, tokenizer in ((teacher, of_teacher), (student, of_student)):
        _speak_of_changes(checkpoint, tokenizer)
    _speak_of_surplus(teacher, student, of_teacher, of_student)
    _speak_of_turn_end(student, of_student)
    _speak_of_auto_tokenizer(student, of_student)
    _speak_of_pieces(student, of_student)


def with_control_tokens(tokenizer: Tokenizer) -> str:
    """A text with the control tokens in it, blanks on both sides."""
    return " a ".join(["", *sorted(tokenizer.control_tokens), ""])


def _speak_of_changes(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Sample texts that come back otherwise."""
    found = list(changes(tokenizer))
    for kind, changed in (
        ("has no token for characters or words", [change for change in found if change.unknown]),
        ("changes spaces, letter case or Unicode form", [change for change in found if not change.unknown]),
    ):
        if changed:
            logger.warning(
                "%s: its tokenizer %s of %d of %d sample texts; %r becomes %r",
                checkpoint, kind, len(changed), len(SAMPLE_TEXTS), changed[0].text, changed[0].becomes,
            )  # fmt: skip


def _speak_of_surplus(teacher: Checkpoint, student: Checkpoint, of_teacher: Tokenizer, of_student: Tokenizer) -> None:
    known = of_student.ids
    surplus = {index: token for token, index in of_teacher.vocabulary().items() if index >= known}
    if not surplus:
        return
    logger.warning(
        "%s has %d tokens that %s has not (%s): they are never sampled by the student, their probability is tail, and "
        "responses of the teacher that hold one are left out",
        teacher, len(surplus), student, _some([repr(surplus[index]) for index in sorted(surplus)]),
    )  # fmt: skip
    ends = [index for index in dict.fromkeys(teacher.eos_ids) if index >= known]
    if ends:
        logger.warning(
            "%s ends responses with %s as well, which %s does not have: only %s end a response of this run",
            teacher, _some([repr(surplus.get(index, index)) for index in ends]), student, _named(of_student, student),
        )  # fmt: skip


def _speak_of_turn_end(student: Checkpoint, tokenizer: Tokenizer) -> None:
    """Say where the chat template closes an assistant's turn with what is no end token."""
    closing = tokenizer.turn_end_ids()
    if not closing:
        logger.info("%s: its chat template closes an assistant's turn with no control token", student)
    elif closing[-1] not in student.eos_ids:
        logger.warning(
            "%s: its chat template closes an assistant's turn with %r (id %d), which is no end token (%s): responses "
            "will be sampled past the end of the turn; add it to eos_token_id in the generation_config.json of teacher "
            "and student",
            student, tokenizer.decode(closing[-1:]), closing[-1], _named(tokenizer, student),
        )  # fmt: skip


def _speak_of_auto_tokenizer(student: Checkpoint, tokenizer: Tokenizer) -> None:
    """Say where whoever loads the student by transformers' AutoTokenizer would get other ids than this run."""
    if not (student.folder / JSON_FILE).is_file() or code_of(read_settings(student.folder)):
        return
    try:
        other = Tokenizer(auto_tokenizer(student.folder, False), False, tokenizer.control_tokens)
        text = different_ids(other, tokenizer, (*SAMPLE_TEXTS, with_control_tokens(tokenizer)))
        if text is None:
            return
        found = f"reads {text!r} as {other.decode(other.text_ids(text))!r}"
    except Exception as error:  # whatever a loader raises of files that it takes for others
        found = f"cannot load it ({' '.join(str(error).split())})"
    logger.warning(
        "%s: transformers' AutoTokenizer %s; this run uses %s itself. Load the student's with "
        "PreTrainedTokenizerFast(tokenizer_file=...)", student, found, JSON_FILE,
    )  # fmt: skip


def _speak_of_pieces(student: Checkpoint, tokenizer: Tokenizer) -> None:
    """Say where transformers reads a bare tokenizer.model otherwise than SentencePiece does.

    It does so after control tokens and where spaces lead, by the setting `legacy`, whose default is another in 4 and 5.
    """
    bare = (student.folder / MODEL_FILE).is_file() and not (student.folder / JSON_FILE).is_file()
    if not bare or isinstance(tokenizer.encoder, SentencePieceTokenizer):
        return
    try:
        pieces = SentencePieceTokenizer(student.folder, read_settings(student.folder))
    except (ValueError, OSError):  # what it refuses transformers has read
        return
    other = Tokenizer(pieces, False, tokenizer.control_tokens)
    text = different_ids(other, tokenizer, (*SAMPLE_TEXTS, "  leading", with_control_tokens(tokenizer)))
    if text is not None:
        logger.warning(
            "%s: transformers reads %r otherwise than SentencePiece reads %s; this run does as transformers (see "
            "`legacy` in tokenizer_config.json)", student, text, MODEL_FILE,
        )  # fmt: skip


def _named(tokenizer: Tokenizer, checkpoint: Checkpoint) -> str:
    return ", ".join(f"{tokenizer.decode([index])!r}, id {index}" for index in checkpoint.eos_ids)


def _some(names: list[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (", ..." if names[EXAMPLES:] else "")
