#!/usr/bin/env python3
"""What each pass of the annotation costs, and what the one that is left out would change: on the samples of a real run.

    python tools/benchmark_annotation.py RUN [--threads 2] [--json FILE]

Of the four NLLs behind a verdict the annotator prefills three; the student's given the prompt is the mean of the
logprobs the sidecar sampled under. Here that one is prefilled as well, by the very version that sampled, and every
verdict that rests on Δ-IFD is passed again with it. A verdict may differ only where Δ-IFD lies nearer to a border (0 or
τ) than the two engines' Δ-IFD lie to each other.

RUN is a finished run whose rounds, rollouts and versions are still on disk; nothing in it is changed. Exit status: 0;
1 a verdict differs for another reason than rounding; 2 bad input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_npd.buffer.plan import Plan, make_plan
from megatron_npd.buffer.shards import CorruptShardError, Shard, read_shard
from megatron_npd.config import Config, load_config
from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.run_directory import RunDirectory, write_json
from megatron_npd.schema import Verdict
from megatron_npd.selection.delta_ifd import ifd

if TYPE_CHECKING:
    from megatron_npd.teacher.prefill import PrefillModel

BY_DELTA = (Verdict.KEPT, Verdict.DEGENERATE, Verdict.COGNITIVE_DISCONNECT)
PASSES = {
    "teacher, given the prompt, with its top-k": True,
    "teacher, without the prompt": True,
    "student, without the prompt": True,
    "student, given the prompt": False,
}
"""Pass -> whether the annotator makes it."""


def main() -> int:
    arguments = _arguments()
    # Before torch is imported: threads that spin would measure who else is there.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(arguments.threads)}
    try:
        figures = measure(arguments.run, arguments.threads)
    except (UserError, CorruptShardError) as error:
        print(f"benchmark_annotation: error: {error}", file=sys.stderr)
        return USAGE_STATUS
    report(figures)
    if arguments.json:
        write_json(arguments.json, figures)
    return 1 if figures["unexplained"] else 0


def measure(root: Path, threads: int) -> dict[str, Any]:
    """Seconds of every pass and what becomes of the verdicts, over all rounds.

    Raises:
        UserError: no run directory, or nothing judged in it.
    """
    import torch

    from megatron_npd.mcore.parallel import initialize, shutdown
    from megatron_npd.teacher.prefill import PrefillModel

    run = RunDirectory(root)
    if not run.config.is_file():
        raise UserError(f"{root}: no config.toml in it; must be a run directory")
    config = load_config(run.config)
    shards = list(_judged_shards(run, _plan(run, config)))
    if not shards:
        raise UserError(f"{root}: no sample of a round in it; must be a run whose shards were not collected")
    torch.set_num_threads(threads)
    parallel, dtype = initialize(), getattr(torch, config.models.dtype)
    teacher, student = (
        PrefillModel(folder, parallel, dtype, "reference", _vocabulary(config), config.training.logits_chunk_tokens)
        for folder in (config.models.teacher, config.models.student)
    )
    seconds, deltas, borders = dict.fromkeys(PASSES, 0.0), [], []
    differ = unexplained = 0
    for version, shard in shards:
        student.load(run.version(version))
        prefilled = _time_passes(seconds, config, shard, teacher, student)
        judged = np.isin(shard["verdict"], BY_DELTA)
        delta = _delta(shard, config, prefilled)[judged]
        gap, border = np.abs(delta - shard["delta_ifd"][judged]), _to_border(shard["delta_ifd"][judged], config)
        changed = _verdicts(delta, config) != shard["verdict"][judged]
        deltas.append(gap)
        borders.append(border)
        differ += int(changed.sum())
        unexplained += int((changed & (border > gap)).sum())
    shutdown()
    gaps = np.concatenate(deltas)
    return {
        "dtype": config.models.dtype,
        "samples": sum(len(shard) for _, shard in shards),
        "judged_by_delta": len(gaps),
        "seconds": seconds,
        "delta_gap": {"median": float(np.median(gaps)), "mean": float(gaps.mean()), "max": float(gaps.max())},
        "nearer_to_a_border": int((np.concatenate(borders) <= gaps).sum()),
        "verdicts_that_differ": differ,
        "unexplained": unexplained,
    }


def _judged_shards(run: RunDirectory, plan: Plan) -> list[tuple[int, Shard]]:
    """(policy version, sample shard) of every unit of the rounds that is there."""
    paths = [(s.version, run.unit("samples", s.name, unit)) for s in plan.round_stages for unit in range(s.units)]
    return [(version, read_shard(path, "samples")) for version, path in paths if path.is_file()]


def _plan(run: RunDirectory, config: Config) -> Plan:
    return make_plan(config, *(len(load_prompt_set(run.prompts(split))) for split in ("train", "heldout")))


def _vocabulary(config: Config) -> int:
    from megatron_npd.hf_config import read_model_dims

    return min(read_model_dims(folder).vocab_size for folder in (config.models.teacher, config.models.student))


def _time_passes(
    seconds: dict[str, float], config: Config, shard: Shard, teacher: PrefillModel, student: PrefillModel
) -> np.ndarray:
    """Make all four passes; returns the student's NLL given the prompt, float64 [N]."""
    from megatron_npd.data.tokenizer import load_tokenizer
    from megatron_npd.teacher.prefix import unconditional_prefix

    tokenizer = load_tokenizer(Path(config.models.student), trust_remote_code=config.models.trust_remote_code)
    prefix = np.array(unconditional_prefix(tokenizer, config.selection.unconditional_prefix), dtype=np.int32)
    scored = shard["verdict"] != Verdict.OUT_OF_VOCABULARY
    responses = [shard.response(row) if scored[row] else np.zeros(0, np.int32) for row in range(len(shard))]
    given = [(shard.prompt(row), response) for row, response in enumerate(responses)]
    alone = [(prefix, response) for response in responses]
    length, top_k, temperature = config.annotator.pack_length, config.annotator.top_k, config.training.kd_temperature
    work = (
        lambda: teacher.annotate(given, length, top_k, temperature),
        lambda: teacher.mean_nll(alone, length),
        lambda: student.mean_nll(alone, length),
        lambda: student.mean_nll(given, length),
    )
    result = None
    for name, make_pass in zip(PASSES, work, strict=True):
        started = time.monotonic()
        result = make_pass()
        seconds[name] += time.monotonic() - started
    assert isinstance(result, np.ndarray)
    return result


def _delta(shard: Shard, config: Config, student_conditional: np.ndarray) -> np.ndarray:
    form = config.selection.form
    return shard["ifd_teacher"] - ifd(student_conditional, shard["nll_student_unconditional"], form)


def _to_border(delta: np.ndarray, config: Config) -> np.ndarray:
    return np.minimum(np.abs(delta), np.abs(delta - config.selection.tau))


def _verdicts(delta: np.ndarray, config: Config) -> np.ndarray:
    """Of samples that nothing but their Δ-IFD speaks against."""
    beyond = np.where(delta > config.selection.tau, Verdict.COGNITIVE_DISCONNECT, Verdict.KEPT)
    return np.where(delta < 0, Verdict.DEGENERATE, beyond)


def report(figures: dict[str, Any]) -> None:
    """The same as a table for people."""
    seconds = figures["seconds"]
    total, gap = sum(seconds.values()), figures["delta_gap"]
    print(f"{figures['samples']} samples in {figures['dtype']}; seconds of each pass:")
    for name, is_made in PASSES.items():
        print(f"  {name:<44} {seconds[name]:8.2f} {seconds[name] / total:6.1%}{'' if is_made else '   left out'}")
    print(
        f"Δ-IFD by the sidecar's logprobs against a prefill: {gap['median']:.2g} apart in the median, {gap['mean']:.2g} "
        f"on average, {gap['max']:.2g} at most, over {figures['judged_by_delta']} samples that Δ-IFD decides"
    )
    print(
        f"{figures['nearer_to_a_border']} lie nearer to a border than that; {figures['verdicts_that_differ']} verdicts "
        f"differ, {figures['unexplained']} of them not by rounding"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
