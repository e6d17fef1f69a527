"""What crosses a file between roles: names, shapes, dtypes. Version it with `SCHEMA_VERSION`.

Legend of dimensions: N samples in a shard, P prompt tokens in total, R response tokens in total,
A response tokens of the kept samples (those with a teacher annotation), K = top-k.

Ragged columns are a flat array and an `offsets` array of N + 1 int64: sample i owns
`values[offsets[i]:offsets[i + 1]]`.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

SCHEMA_VERSION = 2


class FinishReason(IntEnum):
    """Why generation of a response ended."""

    STOP = 0  # an end-of-sequence token, which is the response's last id
    LENGTH = 1  # cut by max_new_tokens or the context
    ABORT = 2  # the engine gave up; never scored, always redone or rejected


class Verdict(IntEnum):
    """Whether a sample is trained on, and if not, why. Lower-case names are used in reports."""

    KEPT = 0
    DEGENERATE = 1  # delta_ifd < 0
    COGNITIVE_DISCONNECT = 2  # delta_ifd > tau
    EMPTY = 3  # no response token, or the end token alone
    TRUNCATED = 4  # cut by the length limit
    NON_FINITE = 5  # a score is NaN or infinite
    ABORTED = 6  # the engine gave up on it
    OUT_OF_VOCABULARY = 7  # an id that one of the two models does not have
    RANDOM = 8  # dropped by lot


# column name -> (dtype, dimensions). A shard holds exactly these columns.
ROLLOUT_COLUMNS: dict[str, tuple[str, str]] = {
    "prompt_index": ("int64", "N"),  # row of the tokenised prompt set
    "sample_index": ("int32", "N"),  # 0 .. samples_per_prompt - 1; a given response among them: samples_per_prompt
    "seed": ("int64", "N"),  # sampling seed, derived from the identity
    "policy_version": ("int32", "N"),  # version that sampled it; -1: the teacher, -2: nobody, it was given
    "finish_reason": ("uint8", "N"),  # FinishReason
    "prompt_ids": ("int32", "P"),
    "prompt_offsets": ("int64", "N+1"),
    "response_ids": ("int32", "R"),  # includes the end token where finish_reason is STOP
    "response_offsets": ("int64", "N+1"),
    "behaviour_logprobs": ("float32", "R"),  # log pi_gen(y_t | x, y_<t), nats, temperature 1; NaN: given
}

SAMPLE_COLUMNS: dict[str, tuple[str, str]] = {
    **ROLLOUT_COLUMNS,
    "nll_teacher_conditional": ("float64", "N"),  # mean over the response tokens, nats
    "nll_teacher_unconditional": ("float64", "N"),
    "nll_student_conditional": ("float64", "N"),
    "nll_student_unconditional": ("float64", "N"),
    "ifd_teacher": ("float64", "N"),
    "ifd_student": ("float64", "N"),
    "delta_ifd": ("float64", "N"),
    "verdict": ("uint8", "N"),  # Verdict
    "topk_offsets": ("int64", "N+1"),  # rows of the annotation; empty for samples not kept
    "topk_ids": ("int32", "A,K"),  # teacher's top-k ids at the position that predicts each response token
    "topk_logprobs": ("float32", "A,K"),  # teacher log p of those ids, full softmax at training.kd_temperature
    "tail_mass": ("float32", "A"),  # 1 - sum of the top-k probabilities, at the same temperature
}

COLUMNS = {"rollouts": ROLLOUT_COLUMNS, "samples": SAMPLE_COLUMNS}

TEACHER_VERSION = -1
"""`policy_version` of responses sampled from the teacher (warm-up and held-out sets)."""
GIVEN_VERSION = -2
"""`policy_version` of responses that the user's data gives. Nobody sampled them: their `behaviour_logprobs` are NaN."""


class Event(StrEnum):
    """What a metrics record is about (see `process.metrics`)."""

    START = "start"
    STEP = "step"
    UNIT = "unit"
    REFRESH = "refresh"
    PUBLISH = "publish"
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation"
    ANSWERS = "answers"
    STAGE = "stage"
    MEMORY = "memory"
    PHASE = "phase"
    FAILURE = "failure"
    RESTART = "restart"
    STOP = "stop"


class StepMetric(StrEnum):
    """What the trainer records of an optimizer step; `training.step_metrics` says how each is computed."""

    LOSS = "train/loss"
    CE = "train/ce"
    KD = "train/kd"
    GRADIENT_NORM = "train/grad_norm"
    LEARNING_RATE = "train/lr"
    RESPONSE_TOKENS = "train/response_tokens"
    TOKENS = "perf/tokens"
    SECONDS = "perf/seconds"
    TOKENS_PER_SECOND = "perf/tokens_per_second"
    TFLOPS_PER_SECOND = "perf/model_tflops_per_second"
    IMBALANCE = "perf/imbalance"
    PACKING_EFFICIENCY = "buffer/packing_efficiency"
    DRIFT = "near_policy/kl"
    POLICY_LAG = "near_policy/lag"
