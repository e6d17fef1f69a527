#!/usr/bin/env python3
"""The rollout buffer alone: shards written, verified and read against plain file copies; planning a round of a million.

    python tools/benchmark_buffer.py throughput [--folder DIR] [--shards 12] [--samples 512] [--rounds 5] [--json FILE]
    python tools/benchmark_buffer.py plan [--samples 1000000] [--json FILE]

throughput: each round writes the same shards by `write_shard` and reads them by `read_shard`, which verifies, and then
copies the files that were written with `shutil.copyfile` and fsync. One after another, so a disturbance meets both.
plan: identities, order, packing and steps of one epoch over that many samples, with the process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.buffer.shards import Shard, concatenate_ragged, read_shard, write_shard
from megatron_npd.models.cost import CostModel
from megatron_npd.schema import COLUMNS, Verdict
from megatron_npd.training.schedule import plan_steps

TOP_K = 10


def make_shard(samples: int, seed: int) -> Shard:
    """An annotated shard: prompts of about 100 tokens, responses log-normal with median 400, three quarters kept."""
    generator = np.random.default_rng(seed)
    prompts = generator.integers(50, 150, samples)
    responses = np.minimum(generator.lognormal(6.0, 0.8, samples).astype(int) + 1, 4000)
    kept = np.arange(samples) % 4 != 3

    def ragged(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return concatenate_ragged([generator.integers(0, 150_000, length) for length in lengths], "int32")

    prompt_ids, prompt_offsets = ragged(prompts)
    response_ids, response_offsets = ragged(responses)
    annotated = int(responses[kept].sum())
    columns = {name: np.zeros(samples, dtype) for name, (dtype, shape) in COLUMNS["samples"].items() if shape == "N"}
    columns |= {
        "prompt_index": np.arange(samples),
        "verdict": np.where(kept, Verdict.KEPT, Verdict.DEGENERATE).astype(np.uint8),
        "prompt_ids": prompt_ids,
        "prompt_offsets": prompt_offsets,
        "response_ids": response_ids,
        "response_offsets": response_offsets,
        "behaviour_logprobs": generator.normal(size=len(response_ids)).astype(np.float32),
        "topk_offsets": np.concatenate([[0], np.cumsum(np.where(kept, responses, 0))]),
        "topk_ids": generator.integers(0, 150_000, (annotated, TOP_K)).astype(np.int32),
        "topk_logprobs": generator.normal(size=(annotated, TOP_K)).astype(np.float32),
        "tail_mass": generator.random(annotated).astype(np.float32),
    }
    return Shard("samples", columns, {"stage": "round_0000", "unit": seed})


def throughput(folder: Path, count: int, samples: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds; rates in bytes a second of shard files."""
    shards = [make_shard(samples, seed) for seed in range(count)]
    seconds: dict[str, list[float]] = {"write": [], "read": [], "copy": []}
    size = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            paths = [Path(scratch, f"unit_{index:06d}") for index in range(count)]
            started = time.perf_counter()
            for path, shard in zip(paths, shards, strict=True):
                write_shard(path, shard)
            written = time.perf_counter()
            for path in paths:
                read_shard(path, "samples")
            read = time.perf_counter()
            for path in paths:
                plain_copy(path, path.with_suffix(".copy"))
            copied = time.perf_counter()
            size = sum(path.stat().st_size for path in paths)
        for name, took in (("write", written - started), ("read", read - written), ("copy", copied - read)):
            seconds[name].append(took)
    ours = [write + read for write, read in zip(seconds["write"], seconds["read"], strict=True)]
    ratios = [copy / both for copy, both in zip(seconds["copy"], ours, strict=True)]
    return {
        "shards": count,
        "samples_per_shard": samples,
        "bytes": size,
        **{f"{name}_mb_per_second": size / statistics.median(took) / 1e6 for name, took in seconds.items()},
        "share_of_plain_copies": statistics.median(ratios),
        "share_of_plain_copies_range": [min(ratios), max(ratios)],
    }


def plain_copy(source: Path, target: Path) -> None:
    """Copy a file and make it durable, as `write_shard` does."""
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def plan(samples: int) -> dict[str, Any]:
    """Plan one epoch over `samples` samples in packs of 32,768."""
    generator = np.random.default_rng(0)
    identities = np.stack([np.arange(samples) // 4, np.arange(samples) % 4], axis=1).astype(np.int64)
    lengths = np.minimum(generator.lognormal(6.0, 0.8, samples).astype(np.int64) + 100, 30_000)
    cost = CostModel(linear=1.0, attention=1e-5, head=0.0)
    started = time.perf_counter()
    steps = plan_steps(1, "round_0000", identities, lengths, epochs=1, capacity=32_768, global_batch_size=64, cost=cost)
    seconds = time.perf_counter() - started
    placed = sum(len(items) for step in steps for items in step.packs)
    assert placed == samples, f"{placed} of {samples} samples were placed"
    packs = sum(len(step.packs) for step in steps)
    return {
        "samples": samples,
        "seconds": seconds,
        "steps": len(steps),
        "packs": packs,
        "fill": float(lengths.sum() / packs / 32_768),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("throughput")
    measure.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    measure.add_argument("--shards", type=int, default=12)
    measure.add_argument("--samples", type=int, default=512)
    measure.add_argument("--rounds", type=int, default=5)
    planning = commands.add_parser("plan")
    planning.add_argument("--samples", type=int, default=1_000_000)
    for command in (measure, planning):
        command.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "throughput":
        result = throughput(arguments.folder, arguments.shards, arguments.samples, arguments.rounds)
    else:
        result = plan(arguments.samples)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
