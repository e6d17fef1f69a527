"""The one tokenizer of teacher and student, checked before anything starts."""

from __future__ import annotations

import logging

from megatron_npd.data.json_tokenizer import JSON_FILE, json_tokenizer
from megatron_npd.data.round_trip import SAMPLE_TEXTS, changes, different_ids
from megatron_npd.data.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from megatron_npd.data.tokenizer import Tokenizer, auto_tokenizer, code_of, load_tokenizer
from megatron_npd.data.tokenizer_settings import read_settings
from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import Checkpoint

logger = logging.getLogger(__name__)

EXAMPLES = 3
"""Tokens that a message names at most."""


def shared_tokenizer(teacher: Checkpoint, student: Checkpoint, trust_remote_code: bool) -> Tokenizer:
    """The one tokenizer of teacher and student: the student's.

    Distillation compares the two models token by token, so the same id must mean the same text to both, prompts must
    be framed alike, and both must end a response alike. The padding token is left out: nothing here is padded.

    The teacher may have tokens besides, with ids above the student's: a *surplus*, which the student never samples and
    whose probability is tail (`teacher/prefill.py`). End tokens of the surplus are left out of the comparison: the
    run's are those both have, and a response of the teacher that holds one of its own is left out as any other that
    the student could not write.

    Raises:
        UserError: one cannot be loaded, they differ, a text does not come back, or a model has fewer embedding rows
            than its tokenizer has ids.
    """
    of_teacher, of_student = (
        load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code, where=str(checkpoint))
        for checkpoint in (teacher, student)
    )
    for checkpoint, tokenizer in ((teacher, of_teacher), (student, of_student)):
        if checkpoint.dims.vocab_size < tokenizer.ids:
            raise UserError(
                f"{checkpoint}: {checkpoint.dims.vocab_size} embedding rows (vocab_size); must be at least the "
                f"tokenizer's {tokenizer.ids} ids"
            )
        _check_file_ids(checkpoint, tokenizer, trust_remote_code)
        _check_round_trip(checkpoint, tokenizer)
    _check_same(teacher, student, of_teacher, of_student)
    _speak_of_surplus(teacher, student, of_teacher, of_student)
    _speak_of_turn_end(student, of_student)
    _speak_of_auto_tokenizer(student, of_student)
    _speak_of_pieces(student, of_student)
    return of_student


def _check_same(teacher: Checkpoint, student: Checkpoint, of_teacher: Tokenizer, of_student: Tokenizer) -> None:
    """Refuse tokenizers that mean different things by what both have."""
    known = of_student.ids
    for rule, value, other in (
        ("vocabulary", *_vocabulary_difference(of_teacher, of_student)),
        *(
            (name, _below(known, getattr(of_teacher, name), of_student, name), getattr(of_student, name))
            for name in ("bos_token_id", "eos_token_id")
        ),
        ("chat template", *_template_difference(of_teacher, of_student)),
        ("end tokens (generation_config.json)", _end_tokens(teacher, known), _end_tokens(student, known)),
        ("the ids of a text", *_id_difference(of_teacher, of_student)),
        ("the ids of a chat", *_framing_difference(of_teacher, of_student)),
    ):
        if value != other:
            raise UserError(
                f"{teacher} and {student} differ in {rule}: {value} against {other}; distillation needs the same "
                "(copy the tokenizer files or the generation config of the one into the other)"
            )


def _below(known: int, index: int | None, of_student: Tokenizer, name: str) -> int | None:
    """A named token's id in the teacher; the student's in its place where the teacher's is of the surplus."""
    return getattr(of_student, name) if index is not None and index >= known else index


def _end_tokens(checkpoint: Checkpoint, known: int) -> list[int]:
    return sorted({index for index in checkpoint.eos_ids if index < known})


def _vocabulary_difference(teacher: Tokenizer, student: Tokenizer) -> tuple[str, str]:
    """The first token, by text, whose id differs, as each of the two sees it; equal texts if there is none. Tokens of
    the teacher with ids above all of the student's are no difference."""
    ours, theirs = teacher.vocabulary(), student.vocabulary()
    known = student.ids
    ours = {token: index for token, index in ours.items() if index < known or token in theirs}
    if ours == theirs:
        return "", ""
    token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    return f"{token!r} has id {ours.get(token, 'none')}", f"id {theirs.get(token, 'none')}"


def _template_difference(teacher: Tokenizer, student: Tokenizer) -> tuple[str, str]:
    """What each template has around the first character that differs; equal texts if there is none."""
    ours, theirs = (str(tokenizer.chat_template or "") for tokenizer in (teacher, student))
    if ours == theirs:
        return "", ""
    pairs = zip(ours, theirs, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return f"{ours[at : at + 20]!r}", f"{theirs[at : at + 20]!r} at character {at}"


def _id_difference(teacher: Tokenizer, student: Tokenizer) -> tuple[str, str]:
    """The first sample text with other ids; equal texts if there is none. Vocabularies alone do not say how a text is
    cut into tokens."""
    text = different_ids(teacher, student)
    return ("", "") if text is None else (f"{text!r} is {teacher.text_ids(text)}", str(student.text_ids(text)))


def _framing_difference(teacher: Tokenizer, student: Tokenizer) -> tuple[str, str]:
    """What a chat becomes, where that differs: the one template writes a control token that only one of them has."""
    chats = [[{"role": "user", "content": "Is it?"}]]
    try:
        ours, theirs = (tokenizer.chat_ids(chats) for tokenizer in (teacher, student))
    except Exception:  # a template that refuses this chat; each prompt will be tried
        return "", ""
    return ("", "") if ours == theirs else (str(ours[0]), str(theirs[0]))


def _check_file_ids(checkpoint: Checkpoint, tokenizer: Tokenizer, trust_remote_code: bool) -> None:
    """Refuse code of a checkpoint that gives other ids than the tokenizer.json beside it."""
    settings = read_settings(checkpoint.folder)
    if not (trust_remote_code and code_of(settings) and (checkpoint.folder / JSON_FILE).is_file()):
        return
    of_file = Tokenizer(json_tokenizer(checkpoint.folder, settings), False, tokenizer.control_tokens)
    text = different_ids(tokenizer, of_file, (*SAMPLE_TEXTS, _with_control_tokens(tokenizer)))
    if text is not None:
        raise UserError(
            f"{checkpoint}: its code gives {text!r} other ids than its {JSON_FILE}; remove the one that is wrong (the "
            "auto_map in tokenizer_config.json, or the file)"
        )


def _check_round_trip(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that loses words or letters of sample texts; say what it changes otherwise."""
    found = list(changes(tokenizer))
    lost = next((change for change in found if change.loses), None)
    if lost:
        raise UserError(
            f"{checkpoint}: its tokenizer turns {lost.text!r} into {lost.becomes!r}; must give back the words and "
            "letters of a text (do tokenizer_config.json's tokenizer_class and the vocabulary files fit together?)"
        )
    for kind, changed in (
        ("has no token for characters", [change for change in found if change.unknown]),
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
        text = different_ids(other, tokenizer, (*SAMPLE_TEXTS, _with_control_tokens(tokenizer)))
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
    text = different_ids(other, tokenizer, (*SAMPLE_TEXTS, "  leading", _with_control_tokens(tokenizer)))
    if text is not None:
        logger.warning(
            "%s: transformers reads %r otherwise than SentencePiece reads %s; this run does as transformers (see "
            "`legacy` in tokenizer_config.json)", student, text, MODEL_FILE,
        )  # fmt: skip


def _with_control_tokens(tokenizer: Tokenizer) -> str:
    """A text with the control tokens in it, blanks on both sides."""
    return " a ".join(["", *sorted(tokenizer.control_tokens), ""])


def _named(tokenizer: Tokenizer, checkpoint: Checkpoint) -> str:
    return ", ".join(f"{tokenizer.decode([index])!r}, id {index}" for index in checkpoint.eos_ids)


def _some(names: list[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (", ..." if names[EXAMPLES:] else "")
