#!/usr/bin/env python3
"""What each pass of the annotation costs, and what the one that is left out would change: on the samples of a real run.

    python tools/benchmark_annotation.py RUN [--threads 2] [--json FILE]

Of the four NLLs behind a verdict the annotator prefills three; the student's given the prompt is the mean of the
logprobs the sidecar sampled under. Here that one is prefilled as well, by the very version that sampled: in the run's
dtype, as a fourth pass would, and in float64. Every verdict that rests on Δ-IFD is passed again with the fourth pass.
Rounding is how far that pass itself takes a Δ-IFD from float64, at most; a verdict that differs must lie nearer to a
border, 0 or τ, than that.

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

from megatron_npd.buffer.plan import Plan, plan_of
from megatron_npd.buffer.shards import CorruptShardError, Shard, read_shard
from megatron_npd.config import Config, load_config
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.files import write_json
from megatron_npd.run_directory import RunDirectory
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

    from megatron_npd.mcore.model import ModelOptions
    from megatron_npd.mcore.model_parallel import initialize, shutdown
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
    teacher, student, exact = (
        PrefillModel(
            folder, parallel, kind, ModelOptions("reference"), _vocabulary(config), config.training.logits_chunk_tokens
        )
        for folder, kind in (
            (config.models.teacher, dtype),
            (config.models.student, dtype),
            (config.models.student, torch.float64),
        )
    )
    seconds, parts = dict.fromkeys(PASSES, 0.0), []
    for version, shard in shards:
        for model in (student, exact):
            model.load(run.version(version))
        fourth = _time_passes(seconds, config, shard, teacher, student)
        reference = exact.mean_nll(_given(shard), config.annotator.pack_length)
        judged = np.isin(shard["verdict"], BY_DELTA)
        nlls = (shard["nll_student_conditional"], fourth, reference)
        parts.append(np.stack([_delta(shard, config, nll)[judged] for nll in nlls]))
    shutdown()
    lengths, scored = (
        np.concatenate([column(shard) for _, shard in shards])
        for column in (lambda shard: np.diff(shard["response_offsets"]), _scored)
    )
    return {
        "dtype": config.models.dtype,
        "samples": len(scored),
        "not_scored": int((~scored).sum()),
        "not_scored_share_of_tokens": float(lengths[~scored].sum() / lengths.sum()),
        "seconds": seconds,
        **compare(*np.concatenate(parts, axis=1), config.selection.tau),
    }


def compare(three: np.ndarray, four: np.ndarray, exact: np.ndarray, tau: float) -> dict[str, Any]:
    """What leaving the fourth pass out does to Δ-IFD and to the verdicts.

    Args:
        three: Δ-IFD as it was judged, float64 [N], of samples that nothing but their Δ-IFD speaks against.
        four: the same with a fourth pass.
        exact: the same with that pass in float64.
    """
    gaps = {"three_passes": np.abs(three - exact), "four_passes": np.abs(four - exact)}
    rounding = gaps["four_passes"].max()
    differ = _verdicts(three, tau) != _verdicts(four, tau)
    border = np.minimum(np.abs(exact), np.abs(exact - tau))
    return {
        "judged_by_delta": len(three),
        "from_float64": {
            name: {"median": float(np.median(gap)), "mean": float(gap.mean()), "max": float(gap.max())}
            for name, gap in gaps.items()
        },
        "within_rounding_of_a_border": int((border <= rounding).sum()),
        "verdicts_that_differ": int(differ.sum()),
        "unexplained": int((differ & (border > rounding)).sum()),
    }


def _judged_shards(run: RunDirectory, plan: Plan) -> list[tuple[int, Shard]]:
    """(policy version, sample shard) of every unit of the rounds that a version sampled and that is there."""
    paths = [(s.version, run.unit("samples", s.name, unit)) for s in plan.round_stages for unit in range(s.own_units)]
    return [(version, read_shard(path, "samples")) for version, path in paths if path.is_file()]


def _plan(run: RunDirectory, config: Config) -> Plan:
    return plan_of(run, config)


def _vocabulary(config: Config) -> int:
    from megatron_npd.models.hf_config import read_model_dims

    return min(read_model_dims(folder).vocab_size for folder in (config.models.teacher, config.models.student))


def _time_passes(
    seconds: dict[str, float], config: Config, shard: Shard, teacher: PrefillModel, student: PrefillModel
) -> np.ndarray:
    """Make all four passes; returns the student's NLL given the prompt, float64 [N]."""
    from megatron_npd.data.tokenizer import load_tokenizer
    from megatron_npd.teacher.prefix import unconditional_prefix

    tokenizer = load_tokenizer(Path(config.models.student), trust_remote_code=config.models.trust_remote_code)
    prefix = np.array(unconditional_prefix(tokenizer, config.selection.unconditional_prefix), dtype=np.int32)
    given = _given(shard)
    alone = [(prefix, response) for _, response in given]
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


def _given(shard: Shard) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, response) of each sample; the response empty where it was not scored."""
    scored = _scored(shard)
    return [
        (shard.prompt(row), shard.response(row) if scored[row] else np.zeros(0, np.int32)) for row in range(len(shard))
    ]


def _scored(shard: Shard) -> np.ndarray:
    return np.isfinite(shard["nll_teacher_conditional"])


def _delta(shard: Shard, config: Config, student_conditional: np.ndarray) -> np.ndarray:
    form = config.selection.form
    return shard["ifd_teacher"] - ifd(student_conditional, shard["nll_student_unconditional"], form)


def _verdicts(delta: np.ndarray, tau: float) -> np.ndarray:
    beyond = np.where(delta > tau, Verdict.COGNITIVE_DISCONNECT, Verdict.KEPT)
    return np.where(delta < 0, Verdict.DEGENERATE, beyond)


def report(figures: dict[str, Any]) -> None:
    """The same as a table for people."""
    seconds, gaps = figures["seconds"], figures["from_float64"]
    print(
        f"{figures['samples']} samples in {figures['dtype']}; {figures['not_scored']} of them, "
        f"{figures['not_scored_share_of_tokens']:.0%} of the response tokens, are rejected unscored (cut, most of them)"
    )
    print("seconds of each pass over the others:")
    for name, is_made in PASSES.items():
        share = seconds[name] / sum(seconds.values())
        print(f"  {name:<44} {seconds[name]:8.2f} {share:6.1%}{'' if is_made else '   left out'}")
    print(f"{figures['judged_by_delta']} samples that Δ-IFD decides; how far it is from the student's NLL in float64:")
    for name, words in (("three_passes", "by the sidecar's logprobs"), ("four_passes", "by a fourth pass")):
        gap = gaps[name]
        print(f"  {words:<28} median {gap['median']:.2g}, mean {gap['mean']:.2g}, at most {gap['max']:.2g}")
    print(
        f"{figures['within_rounding_of_a_border']} lie within rounding of a border; "
        f"{figures['verdicts_that_differ']} verdicts differ, {figures['unexplained']} of them not by rounding"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
