"""A loss to compute on vocabulary-parallel logits, its float64 reference, and ranks that are threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_npd import kernels
from megatron_npd.distributed.parallel import SINGLE, Parallel
from megatron_npd.kernels import native

TAILS = ("none", "bucket", "renormalize")
TOKENS, VOCAB, K = 24, 61, 5


LAYOUTS = [(1, 3), (2, 1), (4, 3)]
"""(tensor-parallel size, padding columns at the end of the vocabulary)"""
FIRST_IDS = (0, 16, 31, 32, 48)
"""Column 0 of every shard in these layouts: the column that another rank's ids must not alias to."""


def use_implementation(name: str) -> Iterator[None]:
    """The body of a fixture: what is behind the public functions while a test runs, "fused" or "reference"."""
    if name == "fused":
        if not native.run_on("cpu"):
            pytest.skip("the fused operators are not built, or disabled")
        yield
    else:
        with native.disabled():
            yield


def definition(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    tail_mass: torch.Tensor,
    kd_lambda: float,
    tail: str,
    temperature: float,
) -> torch.Tensor:
    """The loss [T] as method.md writes it, from whole logits, in their dtype and on their device."""
    log_q_S = (logits / temperature).log_softmax(-1).gather(1, ids)
    logprobs = logprobs.to(logits.dtype)
    p = logprobs.exp()
    if tail == "renormalize":
        p = p / p.sum(-1, keepdim=True)
        kd = (p * (p.log() - log_q_S.log_softmax(-1))).sum(-1)
    else:
        kd = (p * (logprobs - log_q_S)).sum(-1)
    if tail == "bucket":
        mass = tail_mass.to(logits.dtype)
        kd = kd + mass * (mass.log() - torch.log1p(-log_q_S.exp().sum(-1)))
    ce = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return (1 - kd_lambda) * ce + kd_lambda * temperature**2 * kd


class Problem:
    """Random logits, targets and teacher; `FIRST_IDS` are among the targets and in the teacher's top-k."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        tokens: int = TOKENS,
        scale: float = 3.0,
        temperature: float = 1.0,
        vocab: int = VOCAB,
    ):
        generator = torch.Generator().manual_seed(0)
        self.temperature = temperature
        self.logits = (torch.randn(tokens, vocab, generator=generator) * scale).to(dtype)
        teacher = torch.randn(tokens, vocab, generator=generator).double() * 2
        first = torch.tensor([id for id in FIRST_IDS if id < vocab])
        teacher[torch.arange(tokens), first[torch.arange(tokens) % len(first)]] += 6.0
        logprobs, self.ids = (teacher / temperature).log_softmax(-1).topk(K, -1)
        self.logprobs = logprobs.float()
        self.tail_mass = (1 - logprobs.exp().sum(-1)).float()
        self.targets = torch.randint(0, vocab, (tokens,), generator=generator)
        self.targets[::2] = self.ids[::2, 1]
        self.targets[1::4] = first[torch.arange(len(self.targets[1::4])) % len(first)]
        self.upstream = torch.rand(tokens, generator=generator) / max(tokens, 1)

    def definition(self, logits: torch.Tensor, kd_lambda: float, tail: str) -> torch.Tensor:
        """The loss [T] as method.md writes it, from whole logits of any dtype."""
        return definition(logits, *self.labels(), kd_lambda, tail, self.temperature)

    def reference(self, kd_lambda: float, tail: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss [T] and gradient [T, V] of Σ upstream·loss by autograd through the definition, float64."""
        logits = self.logits.double().requires_grad_()
        loss = self.definition(logits, kd_lambda, tail)
        (loss * self.upstream.double()).sum().backward()
        return loss.detach(), logits.grad

    def give_student_more_mass(self) -> None:
        """Halve the teacher's mass on S and leave the student nearly nothing outside: `none` is below 0 everywhere."""
        self.logprobs = self.logprobs - math.log(2)
        self.tail_mass = (1 - self.logprobs.double().exp().sum(-1)).float()
        swing = torch.tensor([0.3, -0.3] * K)[:K]  # within S they differ a little, so the gradient is not 0
        self.logits.scatter_(1, self.ids, (20 + (self.logprobs + swing) * self.temperature).to(self.logits.dtype))

    def labels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.targets, self.ids, self.logprobs, self.tail_mass

    def ours(
        self, kd_lambda: float, tail: str, tp: int = 1, padding: int = 0, operators: ModuleType = kernels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient as `reference` gives them, by `ce_topk_kl` on `tp` ranks; padding must get no gradient."""
        loss, gradient, padding_gradient = self.ours_with_padding(kd_lambda, tail, tp, padding, operators)
        assert not padding_gradient.any(), "padding has a gradient"
        return loss, gradient

    def ours_with_padding(
        self, kd_lambda: float, tail: str, tp: int, padding: int, operators: ModuleType = kernels
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss [T], gradient [T, V] and gradient of the `padding` huge columns at the end of the vocabulary."""

        def work(parallel: Parallel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            shard, valid = shard_of(self.logits, parallel, padding)
            shard.requires_grad_()
            losses = operators.ce_topk_kl(
                shard,
                *self.labels(),
                kd_lambda=kd_lambda,
                tail=tail,
                temperature=self.temperature,
                parallel=parallel,
                valid=valid,
            )
            (losses.loss * self.upstream).sum().backward()
            return losses.loss.detach(), shard.grad[:, :valid], shard.grad[:, valid:]

        losses, gradients, padding_gradients = zip(*on_ranks(tp, work), strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses), "ranks differ in their loss"
        return losses[0], torch.cat(gradients, 1), torch.cat(padding_gradients, 1)


def shard_of(whole: torch.Tensor, parallel: Parallel, padding: int) -> tuple[torch.Tensor, int]:
    """This rank's columns of whole logits, padded by huge ones, and how many of them are real."""
    padded = torch.nn.functional.pad(whole, (0, padding), value=50.0)  # would swallow the softmax if it entered
    columns = padded.shape[1] // parallel.tp_size
    start = parallel.tp_rank * columns
    valid = min(max(whole.shape[1] - start, 0), columns)
    return padded[:, start : start + columns].clone(), valid


def on_ranks(size: int, work: Callable[[Parallel], Any], sent: list[torch.Size] | None = None) -> list[Any]:
    """Run `work` on `size` tensor-parallel ranks (threads, each its own gloo group member).

    `sent` receives the shape of every tensor that rank 0 gives to a gather.
    """
    if size == 1:
        return [work(SINGLE)]
    store = dist.HashStore()
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=30))
            results[rank] = work(Parallel(tp_rank=rank, tp_size=size, tp_group=group))
        except BaseException as error:
            errors.append(error)

    def all_gather(parts: list[torch.Tensor], part: torch.Tensor, group: dist.ProcessGroupGloo) -> None:
        if sent is not None and group.rank() == 0:
            sent.append(part.shape)
        group.allgather([parts], [part]).wait()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    # Several ranks in one process cannot share torch's default group; their own groups do the same gather.
    with mock.patch.object(dist, "all_gather", all_gather):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """|ours - expected| / |expected|, 2-norms."""
    return float((ours.double() - expected).norm() / expected.norm())
