"""The one tokenizer of teacher and student, checked before anything starts."""

from __future__ import annotations

from megatron_npd.data.json_tokenizer import JSON_FILE, json_tokenizer
from megatron_npd.data.round_trip import SAMPLE_TEXTS, changes, different_ids
from megatron_npd.data.tokenizer import Tokenizer, code_of, load_tokenizer
from megatron_npd.data.tokenizer_settings import read_settings
from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import Checkpoint
from megatron_npd.prepare.tokenizer_notes import speak_of_tokenizer, with_control_tokens


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
    speak_of_tokenizer(teacher, student, of_teacher, of_student)
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
    try:
        of_file = Tokenizer(json_tokenizer(checkpoint.folder, settings), False, tokenizer.control_tokens)
    except Exception as error:  # whatever a damaged or foreign file makes `tokenizers` raise
        raise UserError(f"{checkpoint}: its {JSON_FILE} cannot be loaded: {' '.join(str(error).split())}") from None
    text = different_ids(tokenizer, of_file, (*SAMPLE_TEXTS, with_control_tokens(tokenizer)))
    if text is not None:
        raise UserError(
            f"{checkpoint}: its code gives {text!r} other ids than its {JSON_FILE}; remove the one that is wrong (the "
            "auto_map in tokenizer_config.json, or the file)"
        )


def _check_round_trip(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that loses words or letters of sample texts."""
    lost = next((change for change in changes(tokenizer) if change.loses), None)
    if lost:
        raise UserError(
            f"{checkpoint}: its tokenizer turns {lost.text!r} into {lost.becomes!r}; must give back the words and "
            "letters of a text (do tokenizer_config.json's tokenizer_class and the vocabulary files fit together?)"
        )
