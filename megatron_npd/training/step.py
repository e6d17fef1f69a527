"""Forward and loss of one packed batch, in the shape Megatron's schedules ask for.

Legend: T positions of a pack, N positions that predict a response token, V columns of this rank's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from megatron_npd.config import TrainingConfig
from megatron_npd.data.packing import PackedBatch
from megatron_npd.hf_config import ModelDims
from megatron_npd.kernels import ce_topk_kl, token_logprobs
from megatron_npd.mcore.model import forward_packed, valid_vocab_columns
from megatron_npd.mcore.optimizer import sum_over_data_parallel
from megatron_npd.parallel import Parallel


@dataclass(frozen=True)
class StepSums:
    """Sums over response tokens of a global batch; nats."""

    loss: float
    ce: float
    kd: float
    tokens: float
    drift: float
    """Σ r log r - r + 1 with r = π_current / π_gen of the sampled token: an unbiased, non-negative estimate of
    tokens × KL(current || generator) from the generator's samples."""


def forward_step(
    config: TrainingConfig, dims: ModelDims, parallel: Parallel
) -> Callable[[Iterator[PackedBatch], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]]:
    """Megatron's forward-step function for (1 - λ)·CE + λ·KD on packed batches.

    Its loss function returns the sum over this pack's response tokens and their number; Megatron divides the gradients
    once by the number over the whole global batch.
    """
    valid = valid_vocab_columns(dims.vocab_size, parallel)

    def step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        output = forward_packed(model, *_tensors(parallel.device, batch.tokens, batch.cu_seqlens, batch.rows))

        def loss(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            targets_N, ids_NK, logprobs_NK, tail_N, behaviour_N = _tensors(
                parallel.device,
                batch.targets,
                batch.topk_ids,
                batch.topk_logprobs,
                batch.tail_mass,
                batch.behaviour_logprobs,
            )
            losses = ce_topk_kl(
                logits_NV,
                targets_N,
                ids_NK,
                logprobs_NK,
                tail_N,
                kd_lambda=config.kd_lambda,
                tail=config.tail,
                parallel=parallel,
                valid=valid,
            )
            log_ratio_N = -losses.ce - behaviour_N
            ratio_N = log_ratio_N.exp()
            tokens = torch.tensor(len(batch.rows), device=parallel.device)
            sums = (losses.loss, losses.ce, losses.kd, torch.ones_like(losses.ce), ratio_N * log_ratio_N - ratio_N + 1)
            report = torch.stack([value.detach().double().sum() for value in sums])
            return losses.loss.sum(), tokens, {"sums": report}

        return output, loss

    return step


def collect_sums(reports: list[dict[str, torch.Tensor]]) -> StepSums:
    """Sums over micro-batches and data-parallel ranks; call on every rank of the last pipeline stage."""
    total = torch.stack([report["sums"] for report in reports]).sum(0)
    return StepSums(*sum_over_data_parallel(total).tolist())


def logprob_step(
    dims: ModelDims, parallel: Parallel
) -> Callable[[Iterator[Any], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]]:
    """Forward-only step over (tokens, cu_seqlens, rows, targets): reports log p(target), float32 [N]."""
    valid = valid_vocab_columns(dims.vocab_size, parallel)

    def step(batches: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        tokens, cu_seqlens, rows, targets = _tensors(parallel.device, *next(batches))
        output = forward_packed(model, tokens, cu_seqlens, rows)

        def report(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            logprobs_N = token_logprobs(logits_NV, targets, parallel, valid)
            return logprobs_N.sum(), torch.tensor(len(rows)), {"logprobs": logprobs_N}

        return output, report

    return step


def _tensors(device: str, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


assert [field.name for field in fields(StepSums)] == ["loss", "ce", "kd", "tokens", "drift"]  # order of `sums`
