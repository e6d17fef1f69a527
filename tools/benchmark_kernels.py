"""How fast the fused kernels are beside torch's own operators, and on a GPU beside the device's copy bandwidth.

    python tools/benchmark_kernels.py                       # CPU: V = 49,152 and 151,936, bf16, 512 rows
    python tools/benchmark_kernels.py --rows 8192 --vocabulary 131072 153376    # on a GPU

Three operators: `score` (log-probability of the target), `topk` (the teacher's top-10 with the mass outside it) and
`loss` (CE + top-k KL with its gradient). Every candidate of an operator runs once in turn, again and again (A B A B),
and the medians are reported, with the most memory each needed beyond the logits it was given. On a GPU the figure that
counts is the share of the measured copy bandwidth, in bytes that the operator cannot avoid moving: one read of the
logits for score and topk, two reads and one write for the loss.

Exit status: 0; 2 wrong usage, or the fused kernels are not there (one line on stderr).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_npd.distributed.parallel import SINGLE
from megatron_npd.errors import UserError
from megatron_npd.kernels import ce_topk_kl, native, token_logprobs, topk_logprobs
from megatron_npd.kernels.objective import (
    Labels,
    Objective,
    merge_statistics,
    partial_statistics,
    token_losses,
    write_gradient,
)
from megatron_npd.kernels.vocab_parallel import VocabShard

K, KD_LAMBDA = 10, 0.9
UNAVOIDABLE_PASSES = {"score": 1, "topk": 1, "loss": 3}
"""Times an operator must move the logits: read, read, read twice and write once."""
QUEUED = 4
Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Measured:
    """One candidate of one operator. `extra_mb` is memory beyond the inputs, None where it cannot be measured."""

    operator: str
    candidate: str
    vocabulary: int
    milliseconds: float
    extra_mb: float | None
    times_faster: float
    """Than the operator's first candidate, by the medians of the same rounds."""
    bandwidth_share: float | None
    """Unavoidable bytes a second over the measured copy bandwidth; GPU only."""


class Problem:
    """Random logits with labels: half of the targets in the teacher's top-k."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, device: str):
        generator = torch.Generator().manual_seed(0)
        logits = (torch.randn(rows, vocabulary, generator=generator) * 2).to(dtype)
        self.logits = logits.to(device)
        ids = torch.randint(0, vocabulary // K, (rows, K), generator=generator) * K + torch.arange(K)
        probabilities = torch.rand(rows, K + 1, generator=generator).softmax(-1)
        targets = torch.randint(0, vocabulary, (rows,), generator=generator)
        targets[::2] = ids[::2, 0]
        self.ids, self.targets = ids.to(device), targets.to(device)
        self.logprobs, self.tail = probabilities[:, :K].log().to(device), probabilities[:, K].to(device)
        self.vocabulary = vocabulary
        self.overwritten = self.logits.clone()

    def loss_in_place(self) -> torch.Tensor:
        """Our loss with its gradient in the memory of its logits, as the trainer takes it (`kernels.linear`)."""
        labels, shard = Labels(self.targets, self.ids, self.logprobs, self.tail), VocabShard(0, self.vocabulary)
        objective, logits = Objective(KD_LAMBDA, "bucket"), self.overwritten
        statistics = merge_statistics(partial_statistics(logits, labels, objective, shard)[None])
        losses = token_losses(statistics, labels, objective)
        write_gradient(logits, logits, torch.ones_like(losses.loss), statistics, labels, objective, shard)
        return losses.loss

    def loss(self) -> torch.Tensor:
        """Our loss with its gradient."""
        logits = self.logits.detach().requires_grad_()
        labels = (self.targets, self.ids, self.logprobs, self.tail)
        losses = ce_topk_kl(logits, *labels, kd_lambda=KD_LAMBDA, tail="bucket", parallel=SINGLE, valid=self.vocabulary)
        losses.loss.sum().backward()
        return logits.grad

    def torch_loss(self) -> torch.Tensor:
        """The same by autograd."""
        logits = self.logits.detach().requires_grad_()
        autograd_loss(logits, self.targets, self.ids, self.logprobs, self.tail).backward()
        return logits.grad


def autograd_loss(
    logits: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, tail: torch.Tensor
) -> torch.Tensor:
    """The definition: (1 - λ)·CE + λ·KL with the tail as one bucket, summed."""
    log_q = logits.float().log_softmax(-1)
    log_q_S = log_q.gather(1, ids)
    kd = (logprobs.exp() * (logprobs - log_q_S)).sum(-1)
    kd = kd + tail * (tail.log() - torch.log1p(-log_q_S.exp().sum(-1)))
    ce = -log_q.gather(1, targets[:, None])[:, 0]
    return ((1 - KD_LAMBDA) * ce + KD_LAMBDA * kd).sum()


def candidates(problem: Problem, compiled: bool) -> dict[str, Candidates]:
    """Operator -> candidates; the first of each is what ours is compared with."""
    logits, targets, valid = problem.logits, problem.targets, problem.vocabulary

    def without_kernels(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with native.disabled():
                return work()

        return run

    def torch_score() -> torch.Tensor:
        return logits.float().log_softmax(-1).gather(1, targets[:, None])

    def rounded_score() -> torch.Tensor:
        """Wrong in the third digit, as its result has the logits' dtype; but it is what some do."""
        return logits.log_softmax(-1).gather(1, targets[:, None])

    def torch_topk() -> tuple[torch.Tensor, torch.Tensor]:
        return logits.float().log_softmax(-1).topk(K, -1)

    def score() -> torch.Tensor:
        return token_logprobs(logits, targets, SINGLE, valid)

    def topk() -> tuple[torch.Tensor, ...]:
        return topk_logprobs(logits, K, SINGLE, valid)

    operators: dict[str, Candidates] = {
        "score": {
            "torch": torch_score,
            "torch, rounded to 16 bit": rounded_score,
            "reference": without_kernels(score),
            "fused": score,
        },
        "topk": {"torch": torch_topk, "reference": without_kernels(topk), "fused": topk},
        "loss": {
            "torch": problem.torch_loss,
            "reference": without_kernels(problem.loss),
            "fused": problem.loss,
            "fused, in place": problem.loss_in_place,
        },
    }
    if compiled:
        operators["score"]["torch.compile"] = torch.compile(torch_score)
        operators["topk"]["torch.compile"] = torch.compile(torch_topk)
    if logits.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers.functional import liger_cross_entropy

        def liger() -> torch.Tensor:
            leaf = logits.detach().requires_grad_()
            liger_cross_entropy(leaf, targets, reduction="sum").backward()
            return leaf.grad

        operators["loss"]["Liger cross entropy (no KD)"] = liger
    return operators


def measure(operator: str, runs: Candidates, problem: Problem, rounds: int, bandwidth: float | None) -> list[Measured]:
    """Medians of every candidate over rounds in which each runs once."""
    extra = {name: extra_memory(run, problem.logits.is_cuda) for name, run in runs.items()}  # warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run, problem.logits.is_cuda))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    size = problem.logits.numel() * problem.logits.element_size() * UNAVOIDABLE_PASSES[operator]
    return [
        Measured(
            operator,
            name,
            problem.vocabulary,
            1000 * median,
            extra[name],
            first / median,
            size / median / bandwidth if bandwidth else None,
        )
        for name, median in medians.items()
    ]


def timed(run: Callable[[], object], on_gpu: bool) -> float:
    """Seconds of one run; on a GPU of its own clock, the launches of several in its queue, as a step's are."""
    if not on_gpu:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    begin.record()
    for _ in range(QUEUED):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / QUEUED / 1000


def extra_memory(run: Callable[[], object], on_gpu: bool) -> float | None:
    """Most memory a run needed beyond what was there, in MB, its result included; after a first run to warm up."""
    run()
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _status_kb("VmRSS")
    run()
    return max(0.0, (_status_kb("VmHWM") - before) * 1024 / 1e6)


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large device copy, read and write counted; the median of several."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / statistics.median(timed(lambda: target.copy_(source), True) for _ in range(20))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9, help="times every candidate runs")
    text = "also torch.compile (slow to start on a CPU; default: on a GPU)"
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if min(arguments.rows, arguments.threads, arguments.rounds, *arguments.vocabulary) < 1:
            raise UserError("--rows, --threads, --rounds and --vocabulary must be at least 1")
        report(run_all(arguments), arguments)
    except UserError as error:
        print(f"benchmark_kernels: error: {error}", file=sys.stderr)
        return 2
    return 0


def run_all(arguments: argparse.Namespace) -> list[Measured]:
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = device == "cuda" if arguments.compile is None else arguments.compile
    if not native.run_on(device):
        raise UserError(f"the fused kernels do not run on {device}: the log above says why")
    bandwidth = copy_bandwidth(device) if device == "cuda" else None
    results = []
    for vocabulary in arguments.vocabulary:
        problem = Problem(arguments.rows, vocabulary, getattr(torch, arguments.dtype), device)
        for operator, runs in candidates(problem, compiled).items():
            results += measure(operator, runs, problem, arguments.rounds, bandwidth)
    return results


def report(results: list[Measured], arguments: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {arguments.threads} threads"
    print(f"{device}, {arguments.dtype}, {arguments.rows} rows, medians of {arguments.rounds} rounds")
    print(f"{'operator':9}{'candidate':30}{'V':>9}{'ms':>10}{'extra MB':>10}{'times':>8}{'bandwidth':>11}")
    for one in results:
        extra = "?" if one.extra_mb is None else f"{one.extra_mb:.1f}"
        share = "" if one.bandwidth_share is None else f"{100 * one.bandwidth_share:.0f} %"
        print(
            f"{one.operator:9}{one.candidate:30}{one.vocabulary:>9}{one.milliseconds:>10.2f}{extra:>10}"
            f"{one.times_faster:>8.1f}{share:>11}"
        )
    if arguments.json:
        figures = {"device": device, "dtype": arguments.dtype, "rows": arguments.rows}
        arguments.json.write_text(json.dumps(figures | {"results": [asdict(one) for one in results]}, indent=2))


def _status_kb(key: str) -> int:
    """A size from /proc/self/status, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise UserError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    sys.exit(main())
