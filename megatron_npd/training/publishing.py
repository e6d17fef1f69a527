"""Publishing the trainer's weights with a parity probe, and the finished student."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_npd.buffer.evaluations import best_version
from megatron_npd.buffer.plan import Plan
from megatron_npd.config import Config
from megatron_npd.data.batch import PackedBatch, TrainingSample, aligned, collate
from megatron_npd.data.context_parallel import context_parallel_share
from megatron_npd.data.prompts import HELDOUT, load_prompt_set
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.files import fsync_folder, write_json
from megatron_npd.mcore.model import named_parameters
from megatron_npd.mcore.optimizer import micro_batch_multiple, pipeline_forward, sum_over
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.run_directory import RunDirectory
from megatron_npd.training.step import logprob_step
from megatron_npd.training.student import Student
from megatron_npd.versions.manifest import MANIFEST, PARITY, ParityProbe
from megatron_npd.weights.publish import Published, Publisher

PROBE_SEQUENCES = 16


def make_publisher(
    run: RunDirectory, config: Config, student: Student, on_published: Callable[[Published], None]
) -> Publisher:
    """What publishes this student; every rank makes one."""
    parameters = named_parameters(student.trainable.models)
    return Publisher(run, parameters, student.dims, student.parallel, config.models.student, on_published)


def publish(publisher: Publisher, run: RunDirectory, config: Config, version: int, student: Student) -> None:
    """Begin to publish the student as `version`, with its own logprobs on fixed tokens beside it.

    When it returns the student may be trained on; `publisher` says when the version is visible.
    """
    since = time.monotonic()
    models = student.trainable.models
    probe = _parity_probe(run, config, models, student.dims, student.parallel)
    publisher.publish(version, named_parameters(models), probe, since)


def version_to_hand_over(run: RunDirectory, plan: Plan, config: Config) -> int | None:
    """Which version the finished student is (`export`); None as long as a score that decides it is missing."""
    if config.export.version == "last":
        return plan.final_version
    return best_version(run, plan, config.export.by)


def write_student(run: RunDirectory, version: int, by: str = "") -> None:
    """Make `student_hf/` from a published version: the same files (hard links where possible), no run internals.

    `by`: the score it was chosen by, "" for none.
    """
    write_json(run.handed_over, {"version": version, "by": by or None})
    staging = run.root / ".staging-student_hf"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for file in run.version(version).iterdir():
        if file.name not in (MANIFEST, PARITY):
            try:
                os.link(file, staging / file.name)
            except OSError:  # a filesystem without hard links
                shutil.copyfile(file, staging / file.name)
    fsync_folder(staging)
    shutil.rmtree(run.student, ignore_errors=True)
    os.rename(staging, run.student)
    fsync_folder(run.root)


def _parity_probe(
    run: RunDirectory, config: Config, models: list[Any], dims: ModelDims, parallel: Parallel
) -> ParityProbe | None:
    """Logprobs of the first held-out prompts under this model; on the logging rank, else None."""
    sequences = _probe_sequences(run, config.training.sequence_length, parallel.sequence_alignment)
    batch, *fill = _probe_batches(sequences, config.training.sequence_length, parallel)
    share = context_parallel_share(batch, parallel.cp_rank, parallel.cp_size)
    step = logprob_step(dims, parallel, config.training.logits_chunk_tokens)
    reports = pipeline_forward(models, step, [share, *fill], config.training.sequence_length)
    if not parallel.is_last_stage:
        return None
    logprobs = torch.zeros(len(batch.rows), device=parallel.device)
    logprobs[torch.from_numpy(share.row_index).to(parallel.device)] = reports[0]["logprobs"]
    flat = sum_over(parallel.cp_group, logprobs).cpu().numpy()
    if not parallel.is_logging_rank:
        return None
    pieces = np.split(flat, np.cumsum([len(sequence) - 1 for sequence in sequences])[:-1])
    return ParityProbe([sequence.tolist() for sequence in sequences], [piece.tolist() for piece in pieces])


def _probe_sequences(run: RunDirectory, capacity: int, alignment: int) -> list[np.ndarray]:
    """The first held-out prompts of two tokens or more that fit into one pack."""
    prompts = load_prompt_set(run.prompts(HELDOUT))
    sequences: list[np.ndarray] = []
    used = 0
    for index in range(min(PROBE_SEQUENCES, len(prompts))):
        sequence = np.asarray(prompts[index])
        length = aligned(len(sequence) - 1, alignment)
        if len(sequence) >= 2 and used + length <= capacity:
            sequences.append(sequence)
            used += length
    return sequences


def _probe_batches(sequences: list[np.ndarray], capacity: int, parallel: Parallel) -> list[PackedBatch]:
    """One pack that predicts every token but the first, and the empty ones an interleaved pipeline needs behind it."""
    samples = [
        TrainingSample(
            prompt_ids=sequence[:1],
            response_ids=sequence[1:],
            behaviour_logprobs=np.zeros(len(sequence) - 1, np.float32),
            topk_ids=np.zeros((len(sequence) - 1, 0), np.int32),
            topk_logprobs=np.zeros((len(sequence) - 1, 0), np.float32),
            tail_mass=np.ones(len(sequence) - 1, np.float32),
        )
        for sequence in sequences
    ]
    pack = collate(samples, capacity, 0, parallel.sequence_alignment)
    empty = collate([], capacity, 0, parallel.sequence_alignment)
    fill = context_parallel_share(empty, parallel.cp_rank, parallel.cp_size)
    return [pack, *[fill] * (micro_batch_multiple(parallel) - 1)]
