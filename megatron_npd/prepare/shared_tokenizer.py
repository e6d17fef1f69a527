"""The one tokenizer of teacher and student, checked before anything starts."""

from __future__ import annotations

from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import Checkpoint


def shared_tokenizer(teacher: Checkpoint, student: Checkpoint, trust_remote_code: bool) -> Tokenizer:
    """The one tokenizer of teacher and student.

    Distillation compares the two models token by token, so the same id must mean the same text to both, prompts must
    be framed alike, and both must end a response alike. The padding token is left out: nothing here is padded.

    Raises:
        UserError: one cannot be loaded, they differ, or a model has fewer embedding rows than the tokenizer has ids.
    """
    of_teacher, of_student = (
        load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code, where=str(checkpoint))
        for checkpoint in (teacher, student)
    )
    for rule, value, other in (
        ("vocabulary", *_vocabulary_difference(of_teacher, of_student)),
        *((name, getattr(of_teacher, name), getattr(of_student, name)) for name in ("bos_token_id", "eos_token_id")),
        ("chat template", *_template_difference(of_teacher, of_student)),
        ("end tokens (generation_config.json)", sorted(set(teacher.eos_ids)), sorted(set(student.eos_ids))),
    ):
        if value != other:
            raise UserError(
                f"{teacher} and {student} differ in {rule}: {value} against {other}; distillation needs the same "
                "(copy the tokenizer files or the generation config of the one into the other)"
            )
    ids = max(of_student.vocabulary().values()) + 1
    for checkpoint in (teacher, student):
        if checkpoint.dims.vocab_size < ids:
            raise UserError(
                f"{checkpoint}: {checkpoint.dims.vocab_size} embedding rows (vocab_size); must be at least the "
                f"tokenizer's {ids} ids"
            )
    return of_student


def _vocabulary_difference(teacher: Tokenizer, student: Tokenizer) -> tuple[str, str]:
    """The first token, by text, whose id differs, as each of the two sees it; equal texts if there is none."""
    ours, theirs = teacher.vocabulary(), student.vocabulary()
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
