"""Speed of the trainer on this machine: packed sequences against padded micro-batches, in one run of one process.

    python tools/benchmark_train.py --shape 135m [--json FILE]
    python tools/benchmark_train.py --student HF_FOLDER --sequence-length 32768 --lengths 120,0.9

Optimizer steps on made-up samples of a realistic mix of lengths, through the trainer's own path: collate, forward_step,
train_step. Every step runs packed and then in each padded variant, on the same samples; so what else the machine does
meets all alike. The learning rate is 0: an update costs the same, and every variant must find the same loss.

A padded micro-batch holds a fixed number of samples in random order, each padded to the longest of them (dynamic
padding). The vocabulary is projected for response tokens alone, which favours padding: most trainers project all
positions. What each figure means: docs/benchmarks.md. Exit status: 0; 2 bad input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from pydantic import ValidationError
from torch.profiler import profile

from megatron_npd.config import TrainingConfig
from megatron_npd.data.batch import PackedBatch, TrainingSample, collate
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.hardware.host import cores
from megatron_npd.mcore.acceleration import choose_acceleration
from megatron_npd.mcore.attention import choose_backend
from megatron_npd.mcore.model import ModelOptions, build_gpt, named_parameters
from megatron_npd.mcore.model_parallel import initialize, shutdown
from megatron_npd.mcore.optimizer import make_trainable, train_step
from megatron_npd.models.cost import CostModel, cost_model
from megatron_npd.models.hf_config import ModelDims, read_model_dims
from megatron_npd.training.schedule import Step, deal, plan_steps
from megatron_npd.training.step import collect_sums, forward_step
from megatron_npd.training.student import Student
from megatron_npd.weights.load import load_hugging_face

SHAPES = {
    "tiny": ModelDims("llama", 512, 64, 96, 2, 2, 1, 32, 1e-5, 1e4, 32768, True),
    # 13 of SmolLM2-135M's 30 layers, as in the quickstart.
    "135m": ModelDims("llama", 49152, 576, 1536, 13, 9, 3, 64, 1e-5, 1e5, 8192, True),
    # Without the bias of its output projection, which the model here does not have (40 thousand parameters).
    "openpangu-1b": ModelDims("qwen2", 153376, 1536, 6144, 26, 12, 6, 128, 1e-5, 4e6, 32768, True, qkv_bias=True),
}
TOP_K = 10
HUGGING_FACE_BATCH = 8
"""per_device_train_batch_size of transformers' Trainer where nobody sets it."""
DENSE_BF16 = {r"H100 80GB HBM3$": 989e12, r"H200$": 989e12, r"A100": 312e12}
"""Pattern of a GPU's name -> dense bfloat16 FLOP/s of its data sheet; the first two are the SXM models."""


@dataclass(frozen=True)
class Work:
    """All samples, the steps they are dealt out over (0: warm-up), and the steps' micro-batches in every variant."""

    samples: list[TrainingSample]
    steps: list[Step]
    variants: dict[str, list[list[PackedBatch]]]


@dataclass(frozen=True)
class Measured:
    """One optimizer step."""

    seconds: float
    peak_bytes: int
    loss: float
    gradient_norm: float
    tokens: int
    """Positions of samples, without padding."""
    positions: int
    """Positions computed."""
    micro_batches: int
    model_flops: float
    """Of the samples' positions and the scored rows."""
    computed_flops: float
    """Of all positions computed and the scored rows."""


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        config = _training_config(arguments)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: must be 1; a single process is measured")
        if arguments.json and not arguments.json.parent.is_dir():
            raise UserError(f"--json {arguments.json}: the folder does not exist")
        report = benchmark(arguments, config)
    except UserError as error:
        print(f"benchmark_train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_STATUS
    finally:
        shutdown()
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0


def benchmark(arguments: argparse.Namespace, config: TrainingConfig) -> dict[str, Any]:
    """Everything measured, as it is written to the JSON file."""
    torch.set_num_threads(config.threads)
    dims = read_model_dims(arguments.student) if arguments.student else SHAPES[arguments.shape]
    work = make_work(arguments, config, dims)
    memory_before, cpu_before = _memory(), _cpu_seconds()
    student = make_student(arguments, config, dims)
    device, dtype = student.parallel.device, getattr(torch, arguments.dtype)
    loss_step = forward_step(config, dims, student.parallel)
    timed, gemm = measure(student, loss_step, work, dtype)
    if arguments.profile:
        arguments.profile.write_text(longest_kernels(student, loss_step, work))
    peak, source = peak_rate(device, dtype, gemm)
    lengths = np.array([sample.length for sample in work.samples])
    return {
        "machine": {
            "device": _device_name(device),
            "cores": cores(),
            "cores_used_by_others": _cores_used_by_others(cpu_before),
            "torch": torch.__version__,
            "megatron_core": version("megatron-core"),
        },
        "model": {
            "name": str(arguments.student or arguments.shape),
            "parameters": sum(p.numel() for model in student.trainable.models for p in model.parameters()),
            "dtype": arguments.dtype,
            "attention_backend": student.options.attention_backend,
            **vars(student.options.acceleration),
        },
        "training": {field: getattr(config, field) for field in OPTIONS},
        "samples": {
            "count": len(lengths),
            "positions_median": float(np.median(lengths)),
            "positions_p90": float(np.quantile(lengths, 0.9)),
            "positions_longest": int(lengths.max()),
            "response_share": float(sum(len(sample.response_ids) for sample in work.samples) / lengths.sum()),
        },
        "peak": {"flops_per_second": peak, "source": source, "gemm_flops_per_second": gemm},
        "memory": {"before_the_model_bytes": memory_before, "kind": "RSS" if device == "cpu" else "allocated on GPU"},
        "variants": {name: summary(steps, peak) for name, steps in timed.items()},
        "speedup_of_packed": {name: speedup(timed["packed"], timed[name]) for name in timed if name != "packed"},
    }


def make_work(arguments: argparse.Namespace, config: TrainingConfig, dims: ModelDims) -> Work:
    """As many samples of the mix as fill the packs of a warm-up step and `--repeats` others, laid out every way."""
    generator, cost, capacity = np.random.default_rng(arguments.seed), cost_model(dims), config.sequence_length
    wanted = arguments.repeats + 1
    pairs = draw_lengths(generator, wanted * config.global_batch_size * capacity, capacity, arguments.lengths)

    def planned() -> list[Step]:
        identities = np.array([(index, 0) for index in range(len(pairs))])
        packs = {"capacity": capacity, "global_batch_size": config.global_batch_size}
        lengths = np.array(pairs).sum(1) - 1
        return plan_steps(arguments.seed, "benchmark", identities, lengths, epochs=1, cost=cost, **packs)

    while len(steps := planned()) > wanted:
        pairs.pop()
    samples = [make_sample(generator, dims.vocab_size, *pair) for pair in pairs]
    variants = {"packed": [packed(step, samples, capacity, cost) for step in steps]}
    fit = capacity // max(sample.length for sample in samples)
    sizes = sorted({fit, HUGGING_FACE_BATCH}) if arguments.padded_samples is None else arguments.padded_samples
    for size in sizes:
        order = np.random.default_rng([arguments.seed, size])
        variants[f"padded_{size}"] = [padded(step, samples, size, order) for step in steps]
    return Work(samples, steps, variants)


def draw_lengths(
    generator: np.random.Generator, positions: int, capacity: int, mix: str | None
) -> list[tuple[int, int]]:
    """(prompt, response) tokens of samples of that many positions in all, or a little more."""
    try:
        median, sigma = map(float, mix.split(",")) if mix else (120 * capacity / 2048, 0.9)
        good = 1 <= median <= capacity / 2 and 0 <= sigma <= 2
    except ValueError:
        good = False
    if not good:
        rule = f"must be MEDIAN,SIGMA, the median 1 to half of --sequence-length = {capacity}, sigma 0 to 2"
        raise UserError(f"--lengths {mix}: {rule}")
    pairs: list[tuple[int, int]] = []
    while positions > 0:
        draws = generator.lognormal(0.0, sigma, 2) * (median / 3, median)
        prompt, response = (max(1, round(draw)) for draw in draws)
        if prompt + response - 1 <= capacity:  # else the length limit would have cut it, and the filter rejected it
            pairs.append((prompt, response))
            positions -= prompt + response - 1
    return pairs


def make_sample(generator: np.random.Generator, vocab_size: int, prompt: int, response: int) -> TrainingSample:
    """Random tokens with a valid teacher annotation: unique ids, and with the tail the probabilities sum to 1."""
    mass = generator.dirichlet(np.ones(TOP_K + 1), response) + 1e-6
    mass = (mass / mass.sum(1, keepdims=True)).astype(np.float32)
    first = generator.integers(0, vocab_size, (response, 1))
    return TrainingSample(
        prompt_ids=generator.integers(0, vocab_size, prompt).astype(np.int32),
        response_ids=generator.integers(0, vocab_size, response).astype(np.int32),
        behaviour_logprobs=np.full(response, -np.log(vocab_size), dtype=np.float32),
        topk_ids=((first + np.arange(TOP_K) * (vocab_size // TOP_K)) % vocab_size).astype(np.int32),
        topk_logprobs=np.log(mass[:, :TOP_K]),
        tail_mass=mass[:, TOP_K],
    )


def packed(step: Step, samples: list[TrainingSample], capacity: int, cost: CostModel) -> list[PackedBatch]:
    """Micro-batches of a step as the trainer makes them."""
    attention = [cost.attention * sum(samples[item].length ** 2 for item in items) for items in step.packs]
    [packs] = deal(step.packs, attention, ranks=1)
    return [collate([samples[item] for item in items], capacity, TOP_K) for items in packs]


def padded(step: Step, samples: list[TrainingSample], size: int, generator: np.random.Generator) -> list[PackedBatch]:
    """Micro-batches of `size` samples of a step in random order, each sample padded to the longest of its own."""
    order = generator.permutation([item for items in step.packs for item in items])
    batches = []
    for start in range(0, len(order), size):
        group = [samples[item] for item in order[start : start + size]]
        longest = max(sample.length for sample in group)
        batches.append(collate(group, len(group) * longest, TOP_K, alignment=longest))
    return batches


def make_student(arguments: argparse.Namespace, config: TrainingConfig, dims: ModelDims) -> Student:
    """As `training.student.make_student`, but the weights may be random."""
    dtype = getattr(torch, arguments.dtype)
    parallel = initialize(seed=arguments.seed)
    acceleration = choose_acceleration(config)
    backend = choose_backend(config.attention_backend, dtype)
    options = ModelOptions(
        backend, recompute=config.recompute, recompute_layers=config.recompute_layers, acceleration=acceleration
    )
    models = build_gpt(dims, parallel, dtype, options)
    if arguments.student:
        load_hugging_face(named_parameters(models), arguments.student, dims, parallel)
    return Student(parallel, dims, options, make_trainable(models, config, parallel, acceleration))


def measure(
    student: Student, loss_step: Callable[..., Any], work: Work, dtype: torch.dtype
) -> tuple[dict[str, list[Measured]], float]:
    """All steps but the warm-up in all variants, which take turns; and the median FLOP/s of a large product."""
    measured: dict[str, list[Measured]] = {name: [] for name in work.variants}
    gemm: list[float] = []
    for number in range(len(work.steps)):
        for name, steps in measured.items():
            try:
                steps.append(run_step(student, loss_step, work, name, number))
            except torch.OutOfMemoryError:
                raise UserError(f"{name}: out of GPU memory; set --padded-samples or --sequence-length") from None
        gemm += gemm_rates(student.parallel.device, dtype)
    return {name: steps[1:] for name, steps in measured.items()}, statistics.median(gemm)


def run_step(student: Student, loss_step: Callable[..., Any], work: Work, variant: str, number: int) -> Measured:
    """One optimizer step in one of the variants."""
    cost, batches = cost_model(student.dims), work.variants[variant][number]
    lengths = np.array([work.samples[item].length for items in work.steps[number].packs for item in items])
    longest = max(len(batch.tokens) for batch in batches)  # only pipelines need one length for all
    with PeakMemory() as memory:
        started = time.perf_counter()
        reports, norm = train_step(student.trainable, batches, loss_step, longest, learning_rate=0.0)
        torch.cuda.synchronize()  # without a GPU `mcore.cpu` makes this nothing
        seconds = time.perf_counter() - started
    sums = collect_sums(reports, student.parallel)
    head = cost.head * sums.tokens
    return Measured(
        seconds=seconds,
        peak_bytes=memory.peak,
        loss=sums.loss / sums.tokens,
        gradient_norm=norm,
        tokens=int(lengths.sum()),
        positions=sum(len(batch.tokens) for batch in batches),
        micro_batches=len(batches),
        model_flops=float(cost.of(lengths).sum()) + head,
        computed_flops=sum(float(cost.of(np.diff(batch.cu_seqlens)).sum()) for batch in batches) + head,
    )


def longest_kernels(student: Student, loss_step: Callable[..., Any], work: Work) -> str:
    """A table of what the last packed step spends its time on, on the GPU if there is one."""
    with profile() as trace:
        run_step(student, loss_step, work, "packed", len(work.steps) - 1)
    on = "self_cpu" if student.parallel.device == "cpu" else "self_device"
    return trace.key_averages().table(sort_by=f"{on}_time_total", row_limit=40, max_name_column_width=90)


class PeakMemory:
    """Most bytes in use inside the `with` block, as `peak`: allocated on the GPU, else the process's resident set."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return self
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # what the variant before left on the heap is none of this one's memory
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
            return
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, _memory())


def gemm_rates(device: str, dtype: torch.dtype, count: int = 5) -> list[float]:
    """FLOP/s of a large product of square matrices, measured `count` times after a warm-up."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rates = []
    for _ in range(count + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(a, b.T)
        torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return rates[1:]


def peak_rate(device: str, dtype: torch.dtype, measured: float) -> tuple[float, str]:
    """The FLOP/s that utilisation is a fraction of, and where the figure is from."""
    if device != "cpu" and dtype == torch.bfloat16:
        for pattern, rate in DENSE_BF16.items():
            if re.search(pattern, torch.cuda.get_device_name()):
                return rate, "data sheet, dense bfloat16"
    return measured, "measured: a large matrix product in the same dtype and process"


def summary(steps: list[Measured], peak: float) -> dict[str, Any]:
    """One variant: medians over its steps, and every step."""

    def median(value: Callable[[Measured], float]) -> float:
        return statistics.median(map(value, steps))

    return {
        "seconds": median(lambda step: step.seconds),
        "tokens_per_second": median(lambda step: step.tokens / step.seconds),
        "micro_batches": median(lambda step: step.micro_batches),
        "fill": sum(step.tokens for step in steps) / sum(step.positions for step in steps),
        "mfu": median(lambda step: step.model_flops / step.seconds) / peak,
        "utilisation_with_padding": median(lambda step: step.computed_flops / step.seconds) / peak,
        "peak_memory_bytes": max(step.peak_bytes for step in steps),
        "steps": [vars(step) for step in steps],
    }


def speedup(ours: list[Measured], other: list[Measured]) -> dict[str, Any]:
    """How many times as long the other variant takes, step by step."""
    pairs = [b.seconds / a.seconds for a, b in zip(ours, other, strict=True)]
    return {"median": statistics.median(pairs), "pairs": pairs}


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    machine, model, training, samples = (report[key] for key in ("machine", "model", "training", "samples"))
    variants, ratios = report["variants"], report["speedup_of_packed"].values()
    memory, gib = report["memory"], 2.0**30
    rows = {
        "": list(variants),
        "seconds a step": [f"{v['seconds']:.2f}" for v in variants.values()],
        "sample tokens/s": [f"{v['tokens_per_second']:,.0f}" for v in variants.values()],
        "micro-batches a step": [f"{v['micro_batches']:g}" for v in variants.values()],
        "fill": [f"{v['fill']:.1%}" for v in variants.values()],
        "model FLOPs utilisation": [f"{v['mfu']:.1%}" for v in variants.values()],
        "utilisation with padding": [f"{v['utilisation_with_padding']:.1%}" for v in variants.values()],
        "peak memory, GiB": [f"{v['peak_memory_bytes'] / gib:.2f}" for v in variants.values()],
        "loss, first step": [f"{v['steps'][0]['loss']:.5f}" for v in variants.values()],
        "packed is faster by": ["", *(f"{r['median']:.2f}x" for r in ratios)],
        "  least and most": ["", *(f"{min(r['pairs']):.2f}-{max(r['pairs']):.2f}" for r in ratios)],
    }
    lines = [
        f"{machine['device']}; {training['threads']} threads on {machine['cores']} cores, of which others used "
        f"{machine['cores_used_by_others']:.1f}; torch {machine['torch']}, megatron-core {machine['megatron_core']}",
        f"{model['name']}: {model['parameters'] / 1e6:.1f}M parameters, {model['dtype']}, "
        f"attention {model['attention_backend']}, recompute {training['recompute']}",
        f"{samples['count']} samples of {samples['positions_median']:.0f} (median), {samples['positions_p90']:.0f} "
        f"(p90), {samples['positions_longest']} (longest) positions, {samples['response_share']:.0%} responses; "
        f"steps of {training['global_batch_size']} packs of {training['sequence_length']}",
        f"peak {report['peak']['flops_per_second'] / 1e12:.3g} TFLOP/s ({report['peak']['source']})",
        f"memory: {memory['kind']}; {memory['before_the_model_bytes'] / gib:.2f} GiB before the model was built",
        "",
    ]
    return "\n".join(lines + [f"{name:26}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows.items()])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


OPTIONS: dict[str, tuple[str, Any, str]] = {
    "sequence_length": ("--sequence-length", 2048, "positions of a pack"),
    "global_batch_size": ("--global-batch", 4, "packs of an optimizer step"),
    "recompute": ("--recompute", "none", "none, selective, block or full"),
    "recompute_layers": ("--recompute-layers", 1, "with --recompute block"),
    "logits_chunk_tokens": ("--logits-chunk-tokens", 4096, "rows projected to the vocabulary at a time"),
    "attention_backend": ("--attention-backend", "auto", "auto, te, torch_varlen or reference"),
    "transformer_engine": ("--transformer-engine", "auto", "auto, on or off"),
    "threads": ("--threads", cores(), "on a CPU"),
}
"""Field of `TrainingConfig` -> option, its default, help."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--student", type=Path, metavar="HF_FOLDER", help="checkpoint to train")
    model.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    for field, (option, default, text) in OPTIONS.items():
        text = f"{text} (default: {default})"
        parser.add_argument(option, dest=field, default=default, type=type(default), help=text)
    text = "response tokens are log-normal, prompts have a third of the median (default: 120,0.9 at a sequence length"
    parser.add_argument("--lengths", metavar="MEDIAN,SIGMA", help=f"{text} of 2048, the median in proportion)")
    text = "samples of a padded micro-batch, a variant for each N (default: 8, and as many as certainly fit in a pack)"
    parser.add_argument("--padded-samples", type=int, nargs="*", metavar="N", help=f"{text}; none: packed alone")
    text = "also trace one packed step and write its longest kernels"
    parser.add_argument("--profile", type=Path, metavar="FILE", help=text)
    parser.add_argument("--repeats", type=int, default=3, help="steps timed, after a warm-up step (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report, every step included")
    return parser


def _training_config(arguments: argparse.Namespace) -> TrainingConfig:
    for option, least, values in (
        ("--repeats", 1, [arguments.repeats]),
        ("--padded-samples", 1, arguments.padded_samples or []),
        ("--seed", 0, [arguments.seed]),
    ):
        if any(value < least for value in values):
            raise UserError(f"{option} {' '.join(map(str, values))}: must be at least {least}")
    try:
        return TrainingConfig(**{field: getattr(arguments, field) for field in OPTIONS})
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"{OPTIONS[fault['loc'][0]][0]} {fault['input']}: {fault['msg'].lower()}") from None


def _memory() -> int:
    """Bytes in use now: allocated on the GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds() -> np.ndarray:
    """Seconds so far, of: the clock, all cores' work, this process's work."""
    user, nice, system = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:4])
    own = os.times()
    return np.array([own.elapsed, (user + nice + system) / os.sysconf("SC_CLK_TCK"), own.user + own.system])


def _cores_used_by_others(before: np.ndarray) -> float:
    elapsed, everyone, own = _cpu_seconds() - before
    return float(max(0.0, everyone - own) / elapsed)


def _device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found.group(1) if found else "unknown CPU"


if __name__ == "__main__":
    sys.exit(main())
