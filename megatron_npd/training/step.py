"""Forward and loss of one packed batch, in the shape Megatron's schedules ask for.

Batches are this rank's context-parallel share of a pack (`data.context_parallel`), which is all of it without.

Legend: N positions of this rank that predict a response token, H hidden size, V columns of this rank's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from megatron_npd.config import TrainingConfig
from megatron_npd.data.batch import PackedBatch
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.hardware.transfer import to_device
from megatron_npd.kernels import linear_ce_topk_kl, token_logprobs
from megatron_npd.mcore.model import forward_packed, head_weight, projected, valid_vocab_columns
from megatron_npd.mcore.optimizer import sum_over
from megatron_npd.models.hf_config import ModelDims


@dataclass(frozen=True)
class StepSums:
    """Sums over response tokens of a global batch; nats."""

    loss: float
    ce: float
    kd: float
    tokens: float
    sampled: float
    """Tokens whose logprob under the policy that sampled them is known; of given responses it is not."""
    drift: float
    """Of these, Σ r log r - r + 1 with r = π_current / π_gen of the sampled token: an unbiased, non-negative estimate
    of tokens × KL(current || generator) from the generator's samples."""


SUMS = [field.name for field in fields(StepSums)]
"""In the order in which a micro-batch reports them."""


def forward_step(
    config: TrainingConfig, dims: ModelDims, parallel: Parallel, kd_lambda: float | None = None
) -> Callable[[Iterator[PackedBatch], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]]:
    """Megatron's forward-step function for (1 - λ)·CE + λ·KD on packed batches.

    λ is `kd_lambda`, or where that is None `training.kd_lambda`.

    Its loss function returns the sum over this share's response tokens and their number; Megatron divides the gradients
    once by the number over the whole global batch: all micro-batches, data- and context-parallel ranks.
    """
    valid = valid_vocab_columns(dims.vocab_size, parallel)

    def step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        tokens, rows = to_device(parallel.device, batch.tokens, batch.rows)
        output = forward_packed(model, tokens, batch.cu_seqlens, rows, parallel)

        def loss(hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            *annotation, behaviour_N = to_device(
                parallel.device,
                batch.targets,
                batch.topk_ids,
                batch.topk_logprobs,
                batch.tail_mass,
                batch.behaviour_logprobs,
            )
            losses = linear_ce_topk_kl(
                hidden_NH,
                head_weight(model),
                *annotation,
                kd_lambda=config.kd_lambda if kd_lambda is None else kd_lambda,
                tail=config.tail,
                temperature=config.kd_temperature,
                parallel=parallel,
                valid=valid,
                chunk_tokens=config.logits_chunk_tokens,
            )
            sampled_N = ~behaviour_N.isnan()
            log_ratio_N = torch.where(sampled_N, -losses.ce - behaviour_N, 0.0)
            ratio_N = log_ratio_N.exp()
            tokens = torch.tensor(len(batch.rows), device=parallel.device)
            terms = {
                "loss": losses.loss,
                "ce": losses.ce,
                "kd": losses.kd,
                "tokens": torch.ones_like(losses.ce),
                "sampled": sampled_N,
                "drift": ratio_N * log_ratio_N - ratio_N + 1,
            }
            report = torch.stack([terms[name].double().sum() for name in SUMS])
            return losses.total, tokens, {"sums": report}

        return output, loss

    return step


def collect_sums(reports: list[dict[str, torch.Tensor]], parallel: Parallel) -> StepSums:
    """Sums over micro-batches, data- and context-parallel ranks; call on every rank of the last pipeline stage."""
    total = torch.stack([report["sums"] for report in reports]).sum(0)
    return StepSums(*sum_over(parallel.dp_cp_group, total).tolist())


def logprob_step(
    dims: ModelDims, parallel: Parallel, chunk_tokens: int
) -> Callable[[Iterator[PackedBatch], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]]:
    """Forward-only step: reports log p(target) of this rank's rows, float32 [N]."""
    valid = valid_vocab_columns(dims.vocab_size, parallel)

    def step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        tokens, rows, targets = to_device(parallel.device, batch.tokens, batch.rows, batch.targets)
        output = forward_packed(model, tokens, batch.cu_seqlens, rows, parallel)

        def report(hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            logprobs = [
                token_logprobs(logits_CV, targets[chunk], parallel, valid)
                for chunk, logits_CV in projected(model, hidden_NH, chunk_tokens)
            ]
            logprobs_N = torch.cat([torch.zeros(0, device=parallel.device), *logprobs])
            return logprobs_N.sum(), torch.tensor(len(rows)), {"logprobs": logprobs_N}

        return output, report

    return step
