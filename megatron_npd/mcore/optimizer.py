"""Data-parallel wrapping, the optimizer and one optimizer step through Megatron's own schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_npd.config import TrainingConfig
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore.acceleration import NONE, Acceleration, force_torch_optimizer
from megatron_npd.mcore.model import unwrap


@dataclass(frozen=True)
class Trainable:
    """A model wrapped for data parallelism, with its optimizer."""

    chunks: list[DistributedDataParallel]
    """This rank's chunks of the model: one, or several in an interleaved pipeline."""
    optimizer: MegatronOptimizer
    parallel: Parallel

    @property
    def models(self) -> list[GPTModel]:
        """The chunks without their wrappers."""
        return [unwrap(chunk) for chunk in self.chunks]


def make_trainable(
    models: list[GPTModel], config: TrainingConfig, parallel: Parallel, acceleration: Acceleration = NONE
) -> Trainable:
    """Wrap a loaded model. The optimizer copies the weights to float32 here, so load them before."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.distributed_optimizer, overlap_grad_reduce=False
    )
    chunks = [DistributedDataParallel(model.config, ddp_config, model) for model in models]
    if not acceleration.fused_optimizer:
        force_torch_optimizer()
    dtype = models[0].config.params_dtype
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed_optimizer,
        ),
        chunks,
    )
    for group in optimizer.param_groups:
        # Megatron marks norms and biases with a multiplier of 0 and leaves it to its own scheduler to apply it.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return Trainable(chunks, optimizer, parallel)


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
    optimizer = trainable.optimizer
    for chunk in trainable.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    reports = _run_schedule(trainable.chunks, forward_step, micro_batches, sequence_length, forward_only=False)
    succeeded, gradient_norm, _ = optimizer.step()
    if not succeeded or not torch.isfinite(torch.as_tensor(gradient_norm)):
        raise FloatingPointError(f"gradient norm is {gradient_norm}")
    return reports, float(gradient_norm)


def pipeline_forward(
    models: list[GPTModel], forward_step: Callable[..., Any], micro_batches: list[Any], sequence_length: int
) -> list[dict[str, Any]]:
    """Forward only, through the same schedule; reports of the last pipeline stage."""
    with torch.no_grad():
        return _run_schedule(models, forward_step, micro_batches, sequence_length, forward_only=True)


def micro_batch_multiple(parallel: Parallel) -> int:
    """An interleaved pipeline runs micro-batches in groups of the pipeline size: their number must be a multiple."""
    return parallel.pp_size if parallel.virtual_pp_size > 1 else 1


def sum_over(group: Any, values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the ranks of a group of `Parallel` (None: one rank)."""
    if group is not None:
        torch.distributed.all_reduce(values, group=group)
    return values


def _run_schedule(
    chunks: list[Any],
    forward_step: Callable[..., Any],
    micro_batches: list[Any],
    sequence_length: int,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """Megatron's schedule for this pipeline layout over packs of a fixed length, one sequence dimension each."""
    iterators = [iter(micro_batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
