#!/usr/bin/env python3
"""This project beside what users would pick: TRL's GKDTrainer, from the same student, for the same wall time.

    python tools/compare_trl.py CONFIG [--repeat 3] [--rates 1e-5 3e-5 1e-4] [--output DIR] [--set KEY=VALUE ...]

1. The student to start from is made once by `npd run` with CONFIG's warm-up and no rounds (DIR/start).
2. Ours: `npd run` with CONFIG's rounds from that student, from the command to its end: engines' starts, evaluations
   of every version, and the report are in the time.
3. TRL: a process of its own (`tools/trl_gkd.py` says with which settings) with the same student, teacher, prompts,
   response limit, sampling temperature and dtype, for as long as ours took, imports and loading included; once for each
   learning rate. The rate with the lowest held-out KL goes on; that run counts as its first, which favours TRL.
4. Both again, in turn, each time with the next seed: ours, TRL, ours, TRL.

Every student is judged by `tools/judge_student.py`: plain transformers, float64, one set of the teacher's responses for
all; greedy answers to questions with a key, and the likeliest of a few given answers (--task).

DIR (default runs/compare_trl) holds a JSON file for every run that is finished, which is not run again; one that was
interrupted is removed and starts anew, for its time would be wrong. A comparison belongs to its configuration, time and
task; rates and repetitions may be added. Alternation guards against a machine that changes its speed, not against other
work on it: the cores that others used are in the table.

Needs `pip install '.[trl]'`, and models that transformers loads by itself. Exit status: 0; 2 bad input, with one line
on stderr; else that of the command that failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison_table import BEFORE, IDLE, KINDS, OTHER, OURS, TRL, Figures, best_rate, text
from judge_student import TASK, read_task
from measured_command import Done, measured
from trl_gkd import STUDENT, TRAINED

from megatron_npd.config import Config, load_config
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.estimates.phases import Course, measured_course
from megatron_npd.files import read_json, write_json
from megatron_npd.process.metrics import read_metrics
from megatron_npd.report.summary import summarise
from megatron_npd.roles import ROLLOUT
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import Event

TOOLS = Path(__file__).resolve().parent
RATES = (1e-5, 3e-5, 1e-4)


class CommandFailed(Exception):
    """A command that was started ended badly."""

    def __init__(self, words: Sequence[str], status: int):
        super().__init__(f"`{' '.join(words)}` ended with status {status}")
        self.status = status


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where it lies."""

    config_file: Path
    overrides: tuple[str, ...]
    config: Config
    output: Path
    task: Path

    def finished(self, name: str) -> Figures | None:
        """The figures of a run, if it is."""
        file = self.output / f"{name}.json"
        return read_json(file) if file.is_file() else None

    def once(self, name: str, run: Callable[[Path], Figures]) -> Figures:
        """The figures of a run, which is run if it is not finished; what an interrupted one left is removed."""
        if (found := self.finished(name)) is not None:
            print(f"{name}: finished already", flush=True)
            return found
        folder = self.output / name
        if folder.exists():
            shutil.rmtree(folder)
        print(f"{name}: {time.strftime('%H:%M:%S')}", flush=True)
        found = {"name": name, **run(folder)}
        write_json(self.output / f"{name}.json", found)
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="configuration (TOML) of a run with rounds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="TRL's peak learning rates to try")
    parser.add_argument("--output", type=Path, default=Path("runs/compare_trl"), help="folder of the comparison")
    parser.add_argument("--task", type=Path, default=TASK, help="questions with answers (judge_student.py)")
    options = parser.parse_args(argv)
    try:
        comparison = prepare(options)
        runs = compare(comparison, tuple(options.rates), options.repeat)
    except UserError as error:
        print(f"compare_trl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_STATUS
    except CommandFailed as error:
        print(f"compare_trl: {error}", file=sys.stderr)
        return error.status
    print(text(runs))
    return 0


def prepare(options: argparse.Namespace) -> Comparison:
    """Everything is checked before anything is run.

    Raises:
        UserError: TRL is not installed, or the input does not do.
    """
    if importlib.util.find_spec("trl") is None:
        raise UserError("trl is not installed; `pip install '.[trl]'` in the checkout installs what was compared")
    if options.repeat < 1:
        raise UserError(f"--repeat {options.repeat}: must be at least 1")
    if min(options.rates) <= 0:
        raise UserError(f"--rates {min(options.rates):g}: must be greater than 0")
    config = load_config(options.config, options.set)
    if config.rounds.count == 0:
        raise UserError("rounds.count = 0: there is nothing to compare; must be at least 1")
    identity = {"config": json.loads(json.dumps(config.model_dump())), "task": read_task(options.task)}
    del identity["config"]["run_directory"]
    record = options.output / "comparison.json"
    if record.is_file() and read_json(record) != identity:
        raise UserError(f"--output {options.output}: holds another comparison; must be another folder")
    if not record.is_file() and options.output.exists() and any(options.output.iterdir()):
        raise UserError(f"--output {options.output}: holds no comparison; must be a new or an empty folder")
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(record, identity)
    return Comparison(options.config, tuple(options.set), config, options.output, options.task)


def compare(comparison: Comparison, rates: Sequence[float], repeat: int) -> list[Figures]:
    """All runs, those of before first, then in the order in which they were run."""
    start = start_student(comparison)
    first = comparison.once("ours_1", lambda folder: ours(comparison, folder, start, 1))
    before = comparison.once("before", lambda _: before_figures(comparison, start))
    trials = [
        comparison.once(f"trl_{rate:g}_1", lambda folder, rate=rate: trl(comparison, folder, start, rate, first))
        for rate in rates
    ]
    best, runs = best_rate(trials), [first, *trials]
    for number in range(2, repeat + 1):
        mine = comparison.once(f"ours_{number}", lambda folder, n=number: ours(comparison, folder, start, n))
        theirs = comparison.once(
            f"trl_{best:g}_{number}", lambda folder, mine=mine: trl(comparison, folder, start, best, mine)
        )
        runs += [mine, theirs]
    return [before, *runs]


def start_student(comparison: Comparison) -> Path:
    """The checkpoint that both sides start from; a warm-up that was interrupted goes on."""
    config = comparison.config
    if not config.warmup.samples:
        return Path(config.models.student)
    run = RunDirectory(comparison.output / "start")
    if not run.summary.is_file():
        print(f"start: {time.strftime('%H:%M:%S')}", flush=True)
        _npd_run(comparison, run.root, {"rounds.count": 0})
    return run.student


def ours(comparison: Comparison, folder: Path, start: Path, number: int) -> Figures:
    """The rounds from the common student, `number` counting from 1."""
    overrides: dict[str, Any] = {
        "models.student": str(start), "seed": comparison.config.seed + number - 1,
        "warmup.source": "teacher", "warmup.samples_per_prompt": 0,
    }  # fmt: skip
    if (known := comparison.output / "start" / "config.toml").is_file():  # decided when the warm-up was prepared
        overrides["models.dtype"] = load_config(known).models.dtype
    done = _npd_run(comparison, folder, overrides)
    run = RunDirectory(folder)
    config, records = load_config(run.config), read_metrics(run.metrics_folder)
    summary = summarise(run, config)
    sampled = [record for record in records if (record["role"], record["event"]) == (ROLLOUT, Event.UNIT)]
    return {
        "system": OURS, "seed": config.seed, "rate": config.training.lr, **_cost(done),
        "steps": summary["optimizer_steps"], "trained_tokens": summary["trained_tokens"],
        "generated_tokens": sum(record["response_tokens"] for record in sampled),
        "seconds_by_kind": seconds_by_kind(measured_course(records)), "own_heldout_kl": summary["heldout_kl_after"],
        "near_policy_kl": summary["near_policy_kl"], "dtype": config.models.dtype,
        **judged(comparison, [run.student])[0],
    }  # fmt: skip


def trl(comparison: Comparison, folder: Path, start: Path, rate: float, beside: Figures) -> Figures:
    """TRL for as long as a run of ours took, with that run's seed."""
    config = comparison.config
    folder.mkdir()
    words = [
        sys.executable, str(TOOLS / "trl_gkd.py"), "--teacher", config.models.teacher, "--student", str(start),
        "--prompts", str(comparison.output / "ours_1"), "--output", str(folder), "--rate", f"{rate:g}",
        "--seconds", f"{beside['seconds']:.3f}", "--seed", str(beside["seed"]), "--dtype", beside["dtype"],
        "--max-new-tokens", str(config.rollout.max_new_tokens), "--temperature", f"{config.rollout.temperature:g}",
        "--began", f"{time.time():.3f}",
    ]  # fmt: skip
    done = measured(words, _environment())
    if done.status:
        raise CommandFailed(words, done.status)
    trained = read_json(folder / TRAINED)
    return {
        "system": TRL, "seed": beside["seed"], "rate": rate, **_cost(done), "beside": beside["name"],
        **{key: trained[key] for key in ("steps", "generated_tokens", "trained_tokens", "first_step_after")},
        **judged(comparison, [folder / STUDENT])[0],
    }  # fmt: skip


def before_figures(comparison: Comparison, start: Path) -> Figures:
    """The student that both start from, and the teacher: what there is to gain."""
    student, teacher = judged(comparison, [start, Path(comparison.config.models.teacher)])
    return {"system": BEFORE, **student, "teacher": teacher}


def judged(comparison: Comparison, students: list[Path]) -> list[Figures]:
    """What `judge_student.py` says, in a process of its own: nothing of it stays in memory beside the next run."""
    file = comparison.output / "judged.json"
    words = [
        sys.executable, str(TOOLS / "judge_student.py"), *map(str, students), "--json", str(file),
        "--teacher", comparison.config.models.teacher, "--run", str(comparison.output / "ours_1"),
        "--task", str(comparison.task),
    ]  # fmt: skip
    if status := measured(words, _environment()).status:
        raise CommandFailed(words, status)
    figures = read_json(file)
    file.unlink()
    return figures


def seconds_by_kind(course: Course) -> dict[str, float]:
    """Busy seconds of a run: rollouts, annotation, training, evaluation, starts, other. They overlap where roles work
    side by side, so they need not add up."""
    seconds: dict[str, float] = defaultdict(float)
    for (kind, _), busy in course.busy().items():
        seconds[kind if kind in KINDS else OTHER] += busy
    return {**seconds, IDLE: course.idle}


def _npd_run(comparison: Comparison, folder: Path, overrides: dict[str, Any]) -> Done:
    """`npd run` to its end."""
    values = {**overrides, "run_directory": str(folder)}
    sets = [*comparison.overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())]
    words = [sys.executable, "-m", "megatron_npd.cli", "run", str(comparison.config_file)]
    words += [word for override in sets for word in ("--set", override)]
    done = measured(words, _environment())
    if done.status:
        raise CommandFailed(words, done.status)
    return done


def _cost(done: Done) -> Figures:
    return {"seconds": done.seconds, "cores_used_by_others": done.cores_used_by_others}


def _environment() -> dict[str, str]:
    """Of every command: no network, threads that wait without burning a core, no word on TRL's experimental parts."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
