"""Optimizer steps of Near-Policy Distillation as method.md defines them, in float64: transformers and plain torch only.

No line of `megatron_npd` runs here. One sample after another, never packed; a dense softmax; AdamW written out. Slow
and obvious on purpose: it is what the Megatron trainer is compared with.

Legend: T positions of a sample, R response tokens, V vocabulary, K teacher's top-k, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


class Sample(Protocol):
    """A prompt, a response, and the teacher's k most likely tokens at each response position."""

    prompt_ids: np.ndarray
    """int [T - R]"""
    response_ids: np.ndarray
    """int [R]"""
    topk_ids: np.ndarray
    """int [R, K]"""
    topk_logprobs: np.ndarray
    """float [R, K], nats"""
    tail_mass: np.ndarray
    """float [R]: 1 - P, stored because computing it from P would cancel"""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a step but weights and samples."""

    lr: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    clip_grad: float
    kd_lambda: float


@dataclass(frozen=True)
class Step:
    """What a step reports, from before its update."""

    loss: float
    """Mean over the response tokens of the global batch, nats."""
    norm: float
    """Of the gradient, before clipping."""


def train(
    checkpoint: Path, samples: Sequence[Sample], recipe: Recipe, steps: int
) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """Take `steps` steps from a Hugging Face checkpoint, each over all `samples`.

    Returns:
        A record of each step, and the updated weights by transformers' names, float64.
    """
    model = _float64_model(checkpoint)
    optimizer = AdamW(dict(model.named_parameters()), recipe)
    history = []
    for _ in range(steps):
        model.zero_grad()
        tokens = sum(len(sample.response_ids) for sample in samples)
        loss = sum(response_loss(model, sample, recipe.kd_lambda) for sample in samples) / tokens
        loss.backward()
        history.append(Step(loss.item(), optimizer.step()))
    return history, {name: parameter.detach() for name, parameter in model.named_parameters()}


def response_loss(model: nn.Module, sample: Sample, kd_lambda: float) -> torch.Tensor:
    """Σ over the response tokens of (1 - λ)·CE + λ·KD, where KD = Σ_S p log(p/q) + (1-P) log((1-P)/(1-Q))."""
    tokens_T = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64))
    logits_RV = model(tokens_T[None]).logits[0, len(sample.prompt_ids) - 1 : -1]
    log_q_RV = logits_RV.log_softmax(-1)
    ce = -log_q_RV.gather(1, torch.from_numpy(sample.response_ids.astype(np.int64))[:, None]).sum()

    ids_RK = torch.from_numpy(sample.topk_ids.astype(np.int64))
    log_p_RK = torch.from_numpy(sample.topk_logprobs.astype(np.float64))
    tail_p_R = torch.from_numpy(sample.tail_mass.astype(np.float64))
    log_tail_q_R = log_q_RV.scatter(1, ids_RK, -torch.inf).logsumexp(-1)
    head = log_p_RK.exp() * (log_p_RK - log_q_RV.gather(1, ids_RK))
    kd = head.sum() + (tail_p_R * (tail_p_R.log() - log_tail_q_R)).sum()
    return (1 - kd_lambda) * ce + kd_lambda * kd


class AdamW:
    """Adam with decoupled weight decay on matrices only, after clipping the gradient by its global norm."""

    def __init__(self, parameters: dict[str, nn.Parameter], recipe: Recipe):
        self.parameters, self.recipe, self.steps = parameters, recipe, 0
        self.first = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        self.second = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    @torch.no_grad()
    def step(self) -> float:
        """Update the parameters in place from their gradients; returns the gradient's norm before clipping."""
        recipe = self.recipe
        self.steps += 1
        norm = sum(parameter.grad.square().sum() for parameter in self.parameters.values()).sqrt().item()
        scale = min(1.0, recipe.clip_grad / (norm + 1e-6))  # 1e-6 is Megatron's
        for name, parameter in self.parameters.items():
            gradient, first, second = parameter.grad * scale, self.first[name], self.second[name]
            first.mul_(recipe.adam_beta1).add_((1 - recipe.adam_beta1) * gradient)
            second.mul_(recipe.adam_beta2).add_((1 - recipe.adam_beta2) * gradient.square())
            unbiased_first = first / (1 - recipe.adam_beta1**self.steps)
            unbiased_second = second / (1 - recipe.adam_beta2**self.steps)
            decay = 0.0 if parameter.ndim == 1 else recipe.weight_decay  # none on norms and biases
            update = unbiased_first / (unbiased_second.sqrt() + recipe.adam_eps) + decay * parameter
            parameter -= recipe.lr * update
        return norm


def _float64_model(checkpoint: Path) -> PreTrainedModel:
    """transformers' model in float64, its norms and rotary angles too, which transformers computes in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module)
    rotary, config = model.model.rotary_emb, model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary.forward = functools.partial(_rotary, head_dim, config.rope_parameters["rope_theta"])
    return model.train()


def _rms_norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def _rotary(
    head_dim: int, theta: float, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles, float64 [1, T, D]."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = position_ids[..., None].double() * frequencies
    both_halves = torch.cat([angles, angles], -1)
    return both_halves.cos(), both_halves.sin()
