#!/usr/bin/env python3
"""What cutting the samples into units costs the rollout sidecar: units of several sizes against one that holds all.

    python tools/benchmark_rollout.py HF_FOLDER [--samples 512] [--units 32] [--limit 256] [--json FILE]

One engine serves the checkpoint, and the sidecar's own loop takes, samples and writes the same responses in turn as one
unit and in units of each size, again and again (A B A B). The lengths are made up, so that every variant does the same
work: log-normal, and a given share of them at the limit. The figure is sampled tokens a second of the engine's work,
from the records that the sidecar writes; what a unit costs shows in the ratio to the one unit of the same repeat.

Exit status: 0; 2 bad input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.buffer.role_context import RoleContext
from megatron_npd.buffer.work import WorkUnit
from megatron_npd.config import Config
from megatron_npd.data.prompts import save_prompt_set
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.files import write_json
from megatron_npd.hardware.host import cores
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.process.metrics import read_metrics
from megatron_npd.roles import SIDECAR, TEACHER
from megatron_npd.rollout.sidecar import Sidecar, generate
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION, Event
from megatron_npd.vllm_engine.engine import Request, RolloutEngine

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class SetLengths(Sidecar):
    """A sidecar whose responses have the lengths it is told, by place in the stage."""

    lengths: np.ndarray

    def requests_of(self, unit: WorkUnit) -> list[Request]:
        lengths = self.lengths[unit.stage.rows(unit.number)].tolist()
        return [replace(one, max_new_tokens=n) for one, n in zip(super().requests_of(unit), lengths, strict=True)]


def main() -> int:
    arguments = _arguments()
    try:
        figures = measure(arguments)
    except UserError as error:
        print(f"benchmark_rollout: error: {error}", file=sys.stderr)
        return USAGE_STATUS
    report(figures)
    if arguments.json:
        write_json(arguments.json, figures)
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of every repeat of every variant.

    Raises:
        UserError: the checkpoint or an argument cannot be used.
    """
    sizes = [arguments.samples, *arguments.units]
    if min(*sizes, arguments.limit, arguments.repeats, arguments.threads) < 1:
        raise UserError("--samples, --units, --limit, --repeats and --threads must be at least 1")
    if not 0 < arguments.at_limit < 1:
        raise UserError(f"--at-limit {arguments.at_limit}: must lie between 0 and 1")
    lengths = made_up_lengths(arguments.samples, arguments.limit, arguments.at_limit)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as folder:
        configs = {size: configuration(Path(folder) / "warm_up", arguments, size) for size in sizes}
        rollout, longest = configs[arguments.samples].rollout, PROMPT_TOKENS + arguments.limit
        engine = RolloutEngine(arguments.checkpoint, TEACHER_VERSION, rollout, arguments.dtype, longest)
        tokens_per_second(engine, configs[arguments.samples], lengths)  # warms up
        for repeat in range(arguments.repeats):
            for size in sizes:
                config = configuration(Path(folder) / f"{size}_{repeat}", arguments, size)
                rates[size].append(tokens_per_second(engine, config, lengths))
        decoded = engine.max_num_seqs
    return {
        "samples": arguments.samples,
        "tokens": int(lengths.sum()),
        "at_limit": float(np.mean(lengths == arguments.limit)),
        "sequences_at_once": decoded,
        "tokens_per_second": {str(size): values for size, values in rates.items()},
        "share_of_one_unit": {
            str(size): statistics.median(b / a for a, b in zip(rates[arguments.samples], rates[size], strict=True))
            for size in sizes[1:]
        },
    }


def made_up_lengths(count: int, limit: int, at_limit: float) -> np.ndarray:
    """int64 [count], log-normal with sigma 0.9, cut at `limit`, of which `at_limit` reach it, in random order."""
    lengths = np.random.default_rng(0).lognormal(0.0, 0.9, count)
    scale = limit / np.quantile(lengths, 1 - at_limit)
    return np.clip(np.round(lengths * scale), 1, limit).astype(np.int64)


def configuration(root: Path, arguments: argparse.Namespace, samples_per_unit: int) -> Config:
    """Of a run that holds out `samples` prompts of random tokens, for the teacher to answer."""
    config = Config.model_validate(
        {
            "run_directory": str(root),
            "models": {
                "teacher": str(arguments.checkpoint), "student": str(arguments.checkpoint), "dtype": arguments.dtype
            },
            "prompts": {"train": "-", "heldout": "-", "max_prompt_tokens": PROMPT_TOKENS},
            "rollout": {
                "max_new_tokens": arguments.limit,
                "samples_per_unit": samples_per_unit,
                "max_num_seqs": arguments.max_num_seqs,
                "kv_cache_gib": arguments.kv_cache_gib,
                "threads": arguments.threads,
            },
            "launch": {"turns": "off"},
        }
    )  # fmt: skip
    vocabulary = read_model_dims(arguments.checkpoint).vocab_size
    ids = np.random.default_rng(1).integers(0, vocabulary, (arguments.samples, PROMPT_TOKENS)).tolist()
    run = RunDirectory(root)
    save_prompt_set(run.prompts("train"), ["unused"], ids[:1])
    save_prompt_set(run.prompts("heldout"), [f"prompt {number}" for number in range(len(ids))], ids)
    return config


def tokens_per_second(engine: RolloutEngine, config: Config, lengths: np.ndarray) -> float:
    """Of the engine's work on all units of the run."""
    context = RoleContext(config, SIDECAR[TEACHER])
    context.open_metrics()
    generate(SetLengths(context, [], lengths), engine, context.plan.teacher_stages)
    units = [record for record in read_metrics(context.run.root / "metrics") if record["event"] == Event.UNIT]
    return sum(unit["response_tokens"] for unit in units) / sum(unit["seconds"] for unit in units)


def report(figures: dict[str, Any]) -> None:
    print(
        f"{figures['samples']} responses of {figures['tokens']} tokens in all, {figures['at_limit']:.0%} of them at "
        f"the limit; {figures['sequences_at_once']} sequences at once"
    )
    for size, rates in figures["tokens_per_second"].items():
        share = figures["share_of_one_unit"].get(size)
        ratio = "one unit" if share is None else f"{share:.1%} of one unit's, the median of the repeats"
        print(f"units of {size:>6}: {', '.join(f'{rate:,.0f}' for rate in rates)} tokens/s; {ratio}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, metavar="HF_FOLDER")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--units", type=int, nargs="+", default=[32], help="samples of a unit")
    parser.add_argument("--limit", type=int, default=256, help="longest response, tokens")
    parser.add_argument("--at-limit", type=float, default=0.1, help="share of the responses that reach it")
    parser.add_argument("--max-num-seqs", type=int, default=0, help="sequences at once; 0: what suits the device")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0, help="on a CPU")
    parser.add_argument("--threads", type=int, default=cores(), help="on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
