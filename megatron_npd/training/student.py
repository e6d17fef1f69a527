"""The student as the trainer holds it: laid out over the ranks, loaded, wrapped with its optimizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from megatron_npd.config import Config
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore.acceleration import choose_acceleration
from megatron_npd.mcore.attention import choose_backend
from megatron_npd.mcore.model import ModelOptions, build_gpt, named_parameters
from megatron_npd.mcore.model_parallel import initialize
from megatron_npd.mcore.optimizer import Trainable, make_trainable
from megatron_npd.models.hf_config import ModelDims, read_model_dims
from megatron_npd.weights.load import load_hugging_face

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Student:
    """This rank's part of the student."""

    parallel: Parallel
    dims: ModelDims
    options: ModelOptions
    trainable: Trainable


def make_student(config: Config) -> Student:
    """Join the other ranks, build the student in the configured layout and load the checkpoint it starts from.

    Raises:
        UserError: a forced backend or optional part cannot run here, or the checkpoint does not fit.
    """
    layout = config.training
    torch.set_num_threads(layout.threads)
    parallel = initialize(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
        config.seed,
        deterministic=config.deterministic,
    )
    dims = read_model_dims(config.models.student)
    dtype = getattr(torch, config.models.dtype)
    acceleration = choose_acceleration(layout)
    options = ModelOptions(
        choose_backend(layout.attention_backend, dtype),
        layout.sequence_parallel,
        layout.recompute,
        layout.recompute_layers,
        acceleration,
    )
    models = build_gpt(dims, parallel, dtype, options)
    load_hugging_face(named_parameters(models), config.models.student, dims, parallel)
    return Student(parallel, dims, options, make_trainable(models, layout, parallel, acceleration))
