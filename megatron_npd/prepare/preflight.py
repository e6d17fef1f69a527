"""Everything that can be found wrong before a model is loaded. Cheap faults first; each is one `UserError` line."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.buffer.plan import given_of
from megatron_npd.config import Config
from megatron_npd.data.prompts import HELDOUT, TRAIN
from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import Checkpoint, check_checkpoint
from megatron_npd.prepare.problem_sets import FramedProblems, framed_problems
from megatron_npd.prepare.prompt_checks import checked_splits
from megatron_npd.prepare.shared_tokenizer import shared_tokenizer
from megatron_npd.prepare.tokenise import TokenisedPrompts
from megatron_npd.teacher.prefix import unconditional_prefix
from megatron_npd.weights.soundness import check_weights

logger = logging.getLogger(__name__)

CONFIG_JSON_NAMES = {
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
}
"""Field of `ModelDims` -> what config.json, and so the user, calls it."""

SPLIT_BY_TENSOR_PARALLEL = ("intermediate_size",)
"""Heads and vocabulary are padded to fit (`ModelDims.padded_kv_heads`, `models.hf_config.padded_vocab_size`)."""

SPLIT_BY_ENGINE = ("num_heads", "intermediate_size")
"""vLLM pads none of these. Key-value heads it splits, or copies where there are fewer than ranks."""


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, checked; the prompts are tokenised already, since checking their lengths took that."""

    teacher: Checkpoint
    student: Checkpoint
    train: TokenisedPrompts
    heldout: TokenisedPrompts
    evaluations: list[FramedProblems]


def preflight(config: Config, with_weights: bool = True) -> Inputs:
    """Check the configuration against the files it names; `with_weights` False: the weights need not be there yet.

    Raises:
        UserError: the first fault found; its line names the key or file, the value and the rule.
    """
    teacher, student = check_models(config, with_weights)
    for checkpoint in (teacher, student):
        if checkpoint.tensors and checkpoint.tensors.left_out:
            logger.warning("%s: not read: %s", checkpoint, checkpoint.tensors.left_out_text())
    tokenizer = shared_tokenizer(teacher, student, config.models.trust_remote_code)
    if teacher.dims.vocab_size != student.dims.vocab_size:
        logger.info(
            "vocab_size differs (teacher %d, student %d) over a shared tokenizer: padding rows, never sampled",
            teacher.dims.vocab_size,
            student.dims.vocab_size,
        )
    if config.annotator.top_k > tokenizer.ids:
        raise UserError(
            f"annotator.top_k = {config.annotator.top_k}: must not exceed the tokenizer's {tokenizer.ids} ids"
        )
    if config.prompts.format == "chat" and not tokenizer.chat_template:
        raise UserError(
            f"{student}: its tokenizer has no chat template; prompts cannot be framed without one (prompts.format = "
            "'text' takes them as plain text)"
        )
    unconditional_prefix(tokenizer, config.selection.unconditional_prefix, config.prompts.format)
    splits = checked_splits(config, tokenizer, student.eos_ids)
    train, heldout = splits[TRAIN], splits[HELDOUT]
    _check_counts(config, train)
    _check_heldout(config, heldout)
    asked = [framed_problems(config, one, tokenizer, student.eos_ids, train) for one in config.evaluation]
    for checkpoint in (teacher, student):  # last: it reads all of them
        if checkpoint.tensors:
            check_weights(str(checkpoint), checkpoint.tensors, checkpoint.dims)
    return Inputs(teacher, student, train, heldout, asked)


def check_models(config: Config, with_weights: bool = True) -> tuple[Checkpoint, Checkpoint]:
    """Teacher and student: whole checkpoints (`with_weights` False: but for these) that fit the sizes configured.

    Raises:
        UserError: see `preflight`.
    """
    teacher = check_checkpoint("models.teacher", Path(config.models.teacher), with_weights)
    student = check_checkpoint("models.student", Path(config.models.student), with_weights)
    _check_splits(config, teacher, student)
    longest, limits = config.longest_sequence, "prompts.max_prompt_tokens + rollout.max_new_tokens"
    if longest > config.prompts.max_prompt_tokens + config.rollout.max_new_tokens:
        limits = "prompts.max_prompt_tokens + the largest evaluation.max_new_tokens"
    vocabulary = min(teacher.dims.vocab_size, student.dims.vocab_size)
    for checkpoint in (teacher, student):
        if longest > checkpoint.dims.max_positions:
            raise UserError(
                f"{limits} = {longest}: must not exceed "
                f"max_position_embeddings = {checkpoint.dims.max_positions} of {checkpoint}"
            )
    if config.annotator.top_k > vocabulary:
        raise UserError(f"annotator.top_k = {config.annotator.top_k}: must not exceed the vocab_size = {vocabulary}")
    return teacher, student


def _check_counts(config: Config, train: TokenisedPrompts) -> None:
    """There must be as many prompts, and as many given responses, as a stage takes."""
    there = f"the {len(train)} prompts of {train.path}"
    answered = f"the {train.answered} given responses of {train.path}"
    from_data = config.warmup.source == "data"
    if from_data and not train.answered:
        raise UserError(
            f"warmup.source = 'data': {train.path} gives no response (a column {config.prompts.columns.response!r}, or "
            "chats that end with the assistant's turn)"
        )
    of_warmup = (train.answered, answered) if from_data else (len(train), there)
    for key, wanted, (most, what) in (
        ("rounds.prompts_per_round", config.rounds.prompts_per_round, (len(train), there)),
        ("warmup.prompts", config.warmup.prompts, of_warmup),
    ):
        if wanted > most:
            raise UserError(f"{key} = {wanted}: must not exceed {what} (0 takes them all)")
    rounds = config.rounds
    own = min(rounds.prompts_per_round or len(train), len(train)) * rounds.samples_per_prompt
    if rounds.count and (wanted := given_of(rounds.given_share, own)) > train.answered:
        raise UserError(
            f"rounds.given_share = {rounds.given_share}: wants {wanted} given responses beside the {own} others of a "
            f"round; must not exceed {answered}"
        )


def _check_heldout(config: Config, heldout: TokenisedPrompts) -> None:
    """Where the data gives the held-out responses, it gives every one."""
    if config.heldout.source == "data" and heldout.answered < len(heldout):
        raise UserError(
            f"heldout.source = 'data': {heldout.path} has {heldout.answered} responses to {len(heldout)} prompts; "
            f"must have one to each (a column {config.prompts.columns.response!r}, or chats that end with the "
            "assistant's turn)"
        )


def _check_splits(config: Config, teacher: Checkpoint, student: Checkpoint) -> None:
    """Model dimensions must divide evenly over the ranks that split them."""
    annotator, training, rollout = config.annotator, config.training, config.rollout
    tensor = "tensor_model_parallel_size"
    pipeline, chunks = training.pipeline_model_parallel_size, training.virtual_pipeline_model_parallel_size
    stages = "training.pipeline_model_parallel_size"
    if chunks > 1:
        stages += " × training.virtual_pipeline_model_parallel_size"
    splits = [
        (f"annotator.{tensor}", annotator.tensor_model_parallel_size, teacher, SPLIT_BY_TENSOR_PARALLEL),
        (f"annotator.{tensor}", annotator.tensor_model_parallel_size, student, SPLIT_BY_TENSOR_PARALLEL),
        (f"training.{tensor}", training.tensor_model_parallel_size, student, SPLIT_BY_TENSOR_PARALLEL),
        (stages, pipeline * chunks, student, ("num_layers",)),
        (f"rollout.{tensor}", rollout.tensor_model_parallel_size, teacher, SPLIT_BY_ENGINE),
        (f"rollout.{tensor}", rollout.tensor_model_parallel_size, student, SPLIT_BY_ENGINE),
    ]
    for key, ranks, checkpoint, fields in splits:
        for field in fields:
            value = getattr(checkpoint.dims, field)
            if value % ranks:
                raise UserError(f"{key} = {ranks}: must divide {CONFIG_JSON_NAMES[field]} = {value} of {checkpoint}")
    for checkpoint in (teacher, student):
        ranks, heads = rollout.tensor_model_parallel_size, checkpoint.dims.num_kv_heads
        if heads % ranks and ranks % heads:
            raise UserError(
                f"rollout.{tensor} = {ranks}: must divide num_key_value_heads = {heads} of {checkpoint} or be a "
                "multiple of it"
            )
