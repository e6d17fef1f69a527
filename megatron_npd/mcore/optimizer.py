"""Data-parallel wrapping, the optimizer and one optimizer step through Megatron's own schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_npd.config import TrainingConfig
from megatron_npd.parallel import Parallel


@dataclass(frozen=True)
class Trainable:
    """A model wrapped for data parallelism, with its optimizer."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    parallel: Parallel


def make_trainable(model: GPTModel, config: TrainingConfig, parallel: Parallel) -> Trainable:
    """Wrap a loaded model. The optimizer copies the weights to float32 here, so load them before."""
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.distributed_optimizer, overlap_grad_reduce=False
        ),
        model,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=model.config.params_dtype == torch.bfloat16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=config.distributed_optimizer,
        ),
        [wrapped],
    )
    return Trainable(wrapped, optimizer, parallel)


def train_step(
    trainable: Trainable,
    micro_batches: list[Any],
    forward_step: Callable[[Iterator[Any], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]],
    sequence_length: int,
    learning_rate: float,
) -> tuple[list[dict[str, Any]], float]:
    """Forward and backward over this rank's micro-batches, then one optimizer step.

    `forward_step` follows Megatron's convention; its loss function returns (sum over tokens, token count, report), and
    gradients are divided once by the tokens of all ranks and micro-batches.

    Returns:
        The reports (last pipeline stage only, else empty) and the gradient norm before clipping.

    Raises:
        FloatingPointError: the gradient was not finite; the weights in memory must not be used any more.
    """
    model, optimizer = trainable.model, trainable.optimizer
    model.zero_grad_buffer()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    reports = _run_schedule(model, forward_step, micro_batches, sequence_length, forward_only=False)
    succeeded, gradient_norm, _ = optimizer.step()
    if not succeeded or not torch.isfinite(torch.as_tensor(gradient_norm)):
        raise FloatingPointError(f"gradient norm is {gradient_norm}")
    return reports, float(gradient_norm)


def pipeline_forward(
    model: torch.nn.Module, forward_step: Callable[..., Any], micro_batches: list[Any], sequence_length: int
) -> list[dict[str, Any]]:
    """Forward only, through the same schedule; reports of the last pipeline stage."""
    with torch.no_grad():
        return _run_schedule(model, forward_step, micro_batches, sequence_length, forward_only=True)


def unwrap(trainable: Trainable) -> GPTModel:
    """The model inside the data-parallel wrapper."""
    return trainable.model.module


def sum_over_data_parallel(values: torch.Tensor) -> torch.Tensor:
    """Sum of a float64 vector over the data-parallel ranks."""
    if parallel_state.get_data_parallel_world_size() > 1:
        torch.distributed.all_reduce(values, group=parallel_state.get_data_parallel_group())
    return values


def _run_schedule(
    model: torch.nn.Module,
    forward_step: Callable[..., Any],
    micro_batches: list[Any],
    sequence_length: int,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """Megatron's schedule for this pipeline layout over packs of a fixed length, one sequence dimension each."""
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
