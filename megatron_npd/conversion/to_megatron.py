"""Hugging Face to Megatron torch_dist."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from megatron_npd.conversion.progress_bar import SAMPLE_SECONDS, ProgressBar, Report
from megatron_npd.conversion.staging import identity, staged
from megatron_npd.data.ahead import Ahead
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import UserError
from megatron_npd.mcore.torch_dist import CheckpointLayout, checkpoint_layout
from megatron_npd.mcore.torch_dist_writer import TorchDistWriter
from megatron_npd.models.hf_checkpoint import weight_files
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.process.memory import PeakMemory
from megatron_npd.weights.companions import copy_companions
from megatron_npd.weights.soundness import check_weights
from megatron_npd.weights.source import HuggingFaceSource, groups_of

logger = logging.getLogger(__name__)

HUGGING_FACE = "hf"
"""Folder of a converted checkpoint that holds configuration and tokenizer."""


def to_megatron(
    source: Path, output: Path, parallel: Parallel, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Report:
    """Convert the checkpoint in `source`. Called again after a kill, it goes on where it was.

    Args:
        parallel: of this single process (`mcore.model_parallel.initialize`).
        dtype: of all tensors; None: as they are.

    Raises:
        UserError: the checkpoint is not whole or not supported, or `output` cannot be written; nothing is lost.
    """
    dims = read_model_dims(source)
    layout, groups = checkpoint_layout(dims, parallel), groups_of(dims)
    with PeakMemory(period_seconds=SAMPLE_SECONDS) as peak:
        tensors = HuggingFaceSource(source, dims)
        if tensors.places.left_out:
            logger.warning("%s: not read: %s", source, tensors.places.left_out_text())
        tensors.check_shapes({name: place.shape for name, place in layout.places.items()})
        dtypes = {name: dtype or tensors.dtype(name) for group in groups for name in group}
        _check_one_dtype_each(source, layout, dtypes)
        sizes = {name: math.prod(layout.places[name].shape) * dtypes[name].itemsize for name in dtypes}
        progress = ProgressBar("hf-to-megatron", sum(sizes.values()))

        def check() -> None:
            check_weights(str(source), tensors.places, dims)

        with staged(output, [source], _job(source, dtype), overwrite, sum(sizes.values()), check) as staging:
            writer = TorchDistWriter(staging, layout, groups, dtypes)
            there = [number for number in range(len(groups)) if writer.is_written(number)]
            for number in there:
                progress.found(len(groups[number]), sum(sizes[name] for name in groups[number]))
            wanted = [number for number in range(len(groups)) if number not in there]
            read = Ahead((n for number in wanted for n in groups[number]), lambda n: tensors.read(n, dtypes[n]))

            def parameter(name: str) -> torch.Tensor:
                progress.wrote(sizes[name])
                return read(name)

            for number in wanted:
                writer.write(number, parameter)
            writer.finish()
            copy_companions(source, staging / HUGGING_FACE)
        progress.close()
    return progress.report(peak.nbytes)


def _check_one_dtype_each(source: Path, layout: CheckpointLayout, dtypes: dict[str, torch.dtype]) -> None:
    """All layers' parts of a stored tensor have its one data type."""
    of_key: dict[str, tuple[str, torch.dtype]] = {}
    for name, dtype in dtypes.items():
        first, expected = of_key.setdefault(layout.places[name].key, (name, dtype))
        if dtype != expected:
            raise UserError(f"{source}: {first} is {expected} and {name} {dtype}; choose one data type with --dtype")


def _job(source: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    files = [source / "config.json", *weight_files(source)]
    return {"direction": "hf-to-megatron", "input": identity(files), "dtype": str(dtype)}
