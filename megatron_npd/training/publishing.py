"""Publishing the trainer's weights with a parity probe, and the finished student."""

from __future__ import annotations

import os
import shutil
from typing import Any

import numpy as np

from megatron_npd.buffer.versions import MANIFEST, PARITY, ParityProbe
from megatron_npd.config import Config
from megatron_npd.data.packing import lay_out
from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.hf_config import ModelDims
from megatron_npd.mcore.model import named_parameters
from megatron_npd.mcore.optimizer import pipeline_forward
from megatron_npd.mcore.parallel import barrier
from megatron_npd.parallel import Parallel
from megatron_npd.run_directory import RunDirectory, fsync_folder
from megatron_npd.training.step import logprob_step
from megatron_npd.weights.publish import publish_version

PROBE_SEQUENCES = 16


def publish(run: RunDirectory, config: Config, version: int, model: Any, dims: ModelDims, parallel: Parallel) -> int:
    """Publish the model as `version`, with this model's own logprobs on fixed tokens beside it; returns bytes."""
    probe = _parity_probe(run, config, model, dims, parallel)
    return publish_version(run, version, named_parameters(model), dims, parallel, config.models.student, probe, barrier)


def write_student(run: RunDirectory, version: int) -> None:
    """Make `student_hf/` from a published version: the same files (hard links where possible), no run internals."""
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
    run: RunDirectory, config: Config, model: Any, dims: ModelDims, parallel: Parallel
) -> ParityProbe | None:
    """Logprobs of the first held-out prompts under this model; on the logging rank, else None."""
    prompts = load_prompt_set(run.prompts("heldout"))
    capacity = config.training.sequence_length
    sequences: list[np.ndarray] = []
    for index in range(min(PROBE_SEQUENCES, len(prompts))):
        sequence = np.asarray(prompts[index])
        if len(sequence) >= 2 and sum(len(s) - 1 for s in sequences) + len(sequence) - 1 <= capacity:
            sequences.append(sequence)
    tokens, cu_seqlens, rows = lay_out([(sequence[:1], sequence[1:]) for sequence in sequences], capacity)
    targets = np.concatenate([sequence[1:] for sequence in sequences]).astype(np.int64)
    reports = pipeline_forward(model, logprob_step(dims, parallel), [(tokens, cu_seqlens, rows, targets)], capacity)
    if not parallel.is_logging_rank:
        return None
    flat = reports[0]["logprobs"].float().cpu().numpy()
    pieces = np.split(flat, np.cumsum([len(sequence) - 1 for sequence in sequences])[:-1])
    return ParityProbe([sequence.tolist() for sequence in sequences], [piece.tolist() for piece in pieces])
