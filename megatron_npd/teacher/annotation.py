"""Turning a rollout shard into a sample shard: four NLLs, Δ-IFD, verdict, and the teacher's top-k of what is kept.

Three of the NLLs take a prefill. The fourth, the student's given the prompt, comes with the shard: it is the mean of
the logprobs under which the sidecar sampled the response, and the parity probe of every refresh holds these to the
trainer's. `tools/benchmark_annotation.py` computes it by a prefill as well and shows how far the two are apart.

What is rejected whatever its scores would be is not prefilled: a response cut by the length limit is longer than most,
and a student that rambles has many.
"""

from __future__ import annotations

import numpy as np

from megatron_npd.buffer.plan import lot
from megatron_npd.buffer.shards import Shard, concatenate_ragged
from megatron_npd.config import Config
from megatron_npd.schema import Verdict
from megatron_npd.selection.rule import Nlls, Responses, SelectionRule
from megatron_npd.teacher.scorer import Annotation, Pair, Scorer


def annotate_shard(
    shard: Shard,
    config: Config,
    rule: SelectionRule,
    teacher: Scorer,
    student: Scorer | None,
    prefix: np.ndarray,
    end_tokens: frozenset[int],
    vocabulary: int,
) -> tuple[Shard, int]:
    """Score every response with teacher and student, given the prompt and given `prefix` alone, and judge it.

    `shard` holds the student's logprobs given the prompt, at temperature 1.

    `student` None: the teacher's own responses or given ones, where Δ-IFD means nothing; its scores stay NaN and only
    empty, cut, out-of-vocabulary and non-finite responses are rejected. It is not asked either, and nothing is scored
    without its prompt, if `rule` does not look at scores. `vocabulary`: ids below it are in both models.
    The scores of a response that is empty, cut (where that rejects it) or not in the vocabulary are NaN.

    Returns:
        The sample shard, and the tokens prefilled over all passes.
    """
    length, count = config.annotator.pack_length, len(shard)
    unknown = np.array([_has_unknown_id(shard, row, vocabulary) for row in range(count)], dtype=bool)
    content = np.array([_content_length(shard.response(row), end_tokens) for row in range(count)])
    lots = np.array([_lot(config.seed, shard, row) for row in range(count)], dtype=np.uint64)
    known = Responses(content, shard["finish_reason"], unknown, lots, by_teacher=student is None)
    scored = ~rule.needs_no_score(known)
    # Passed as empty, what is not scored costs nothing.
    responses = [shard.response(row) if scored[row] else np.zeros(0, np.int32) for row in range(count)]
    conditional: list[Pair] = [(shard.prompt(row), responses[row]) for row in range(count)]
    unconditional: list[Pair] = [(prefix, responses[row]) for row in range(count)]

    teacher_conditional, annotations = teacher.annotate(
        conditional, length, config.annotator.top_k, config.training.kd_temperature
    )
    missing = np.full(count, np.nan)
    student_conditional = _behaviour_nll(shard, scored) if student else missing
    compared = student if rule.looks_at_scores else None
    teacher_unconditional = teacher.mean_nll(unconditional, length) if compared else missing
    student_unconditional = compared.mean_nll(unconditional, length) if compared else missing

    nlls = Nlls(teacher_conditional, teacher_unconditional, student_conditional, student_unconditional)
    judgement = rule.judge(known, nlls)
    columns = {
        **shard.columns,
        "nll_teacher_conditional": nlls.teacher_conditional,
        "nll_teacher_unconditional": nlls.teacher_unconditional,
        "nll_student_conditional": nlls.student_conditional,
        "nll_student_unconditional": nlls.student_unconditional,
        "ifd_teacher": judgement.ifd_teacher,
        "ifd_student": judgement.ifd_student,
        "delta_ifd": judgement.delta_ifd,
        "verdict": judgement.verdict,
        **_topk_columns(annotations, judgement.verdict == Verdict.KEPT, config.annotator.top_k),
    }
    passes = [conditional, unconditional, unconditional] if compared else [conditional]
    tokens = sum(len(before) + len(response) - 1 for pairs in passes for before, response in pairs if len(response))
    metadata = {
        **shard.metadata,
        "kd_temperature": str(config.training.kd_temperature),
        "selection": rule.describe(),
    }
    return Shard("samples", columns, metadata), tokens


def _lot(run_seed: int, shard: Shard, row: int) -> int:
    stage = str(shard.metadata["stage"])
    return lot(run_seed, stage, int(shard["prompt_index"][row]), int(shard["sample_index"][row]))


def _topk_columns(annotations: list[Annotation | None], kept: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """The ragged annotation columns, with rows for kept samples only."""
    nothing = Annotation(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), np.zeros(0, np.float32))
    rows = [a if keep and a is not None else nothing for a, keep in zip(annotations, kept, strict=True)]
    ids, offsets = concatenate_ragged([row.ids for row in rows], "int32")
    return {
        "topk_offsets": offsets,
        "topk_ids": ids,
        "topk_logprobs": np.concatenate([row.logprobs for row in rows]).astype(np.float32),
        "tail_mass": np.concatenate([row.tail_mass for row in rows]).astype(np.float32),
    }


def _behaviour_nll(shard: Shard, wanted: np.ndarray) -> np.ndarray:
    """Mean NLL of each response under the policy that sampled it, nats a token, float64 [N]; NaN where `wanted`,
    bool [N], is False. Those that are wanted are not empty."""
    nll = np.full(len(shard), np.nan)
    for row in np.flatnonzero(wanted):
        logprobs = shard.ragged("behaviour_logprobs", row, "response_offsets")
        nll[row] = -float(logprobs.astype(np.float64).mean())
    return nll


def _has_unknown_id(shard: Shard, row: int, vocabulary: int) -> bool:
    response = shard.response(row)
    return len(response) > 0 and bool((response.min() < 0) | (response.max() >= vocabulary))


def _content_length(response: np.ndarray, end_tokens: frozenset[int]) -> int:
    """Tokens of a response without its end token."""
    return len(response) - int(len(response) > 0 and int(response[-1]) in end_tokens)
