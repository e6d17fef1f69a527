#!/usr/bin/env python3
"""What the quickstart takes on this machine, phase by phase, beside what the cost model says it would take.

    python tools/benchmark_quickstart.py [--set key=value ...] [--run DIR] [--json FILE]     # runs it first
    python tools/benchmark_quickstart.py --of RUN [--rates FILE|RUN] [--json FILE]           # of a run that is finished

From the checkout, after `python examples/quickstart/prepare_models.py --output runs/models`. Runs `npd run` on
examples/quickstart/quickstart.toml in a directory where nothing ran before, then prints the seconds every phase kept a
role busy, twice beside the simulation of the same plan (`megatron_npd.estimates`): with the rates of --rates, which
says how well rates of another run or machine carry over, and with the run's own, which says how well the simulation
itself does. A ratio is estimated over measured. The phases add up: all of them, less what ran side by side, plus the
time in which nobody was busy, is the whole run, from the creation of the first process to the last record.

--rates are examples/quickstart/rates.toml unless said otherwise. To renew that file from a run, and then say in its
first lines which machine and which day:

    python tools/plan_cluster.py examples/quickstart/quickstart.toml --rates RUN --write-rates FILE

Printed as well: the processor with the speed of its matrix products, with the threads each role has; what annotating
and evaluating the rounds takes against training on them; what the rounds do to the held-out KL. Installing and making
the models is not in it. Exit status: 0; 2 bad input, with one line on stderr; else that of `npd run`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from measured_command import measured

from megatron_npd.buffer.plan import Plan, plan_of
from megatron_npd.config import Config, load_config
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.estimates.phases import (
    CHECKPOINT,
    EVALUATION,
    FINISH,
    KINDS,
    PUBLICATION,
    REFRESH,
    Course,
    measured_course,
    rounds_balance,
    simulated_course,
)
from megatron_npd.estimates.rates import read_rates
from megatron_npd.estimates.simulation import simulate
from megatron_npd.estimates.text import workers_of
from megatron_npd.estimates.workload import workload
from megatron_npd.files import read_json, write_json
from megatron_npd.hardware.matrix_rates import product_seconds
from megatron_npd.prepare.preflight import check_models
from megatron_npd.prepare.prepare import check_directory
from megatron_npd.process.metrics import read_metrics
from megatron_npd.report.summary import summarise
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import Event
from megatron_npd.supervise.role_work import role_environment

QUICKSTART = Path(os.path.relpath(Path(__file__).resolve().parents[1] / "examples" / "quickstart"))
RATES = QUICKSTART / "rates.toml"
MEASURED, BY_RATES, BY_OWN_RATES = "measured", "by the rates", "by its own rates"
SIDE_BY_SIDE, IDLE, TOTAL = "less: side by side", "idle: nobody is busy", "total"
SUMMED = {
    EVALUATION: "evaluation of all versions",
    PUBLICATION: "publications (training stands still)",
    CHECKPOINT: "checkpoints (training stands still)",
    REFRESH: "refreshes (generation stands still)",
    FINISH: "finish",
}
"""Kind of work that is one line of the table -> its label."""
KIND_OF_LABEL = {label: kind for kind, label in SUMMED.items()}
PRODUCT = (128, 1024, 1024)
"""Rows, inner and columns of the matrix product whose speed is measured."""
REPEATS = 20
EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Flags of /proc/cpuinfo that decide which kernels run, of x86 and Arm."""


def main(argv: list[str] | None = None) -> int:
    try:
        options = _parser().parse_args(argv)
        if options.matrix_products:
            print(json.dumps(matrix_products(options.matrix_products)))
            return 0
        _check_options(options)
        read_rates(options.rates)  # bad ones are refused before the run, not after it
        clock = None
        if options.of is None:
            status, clock = run_quickstart(options.set, options.run)
            if status:
                print(f"benchmark_quickstart: npd run ended with status {status}: nothing to compare", file=sys.stderr)
                return status
        root = options.of or _run_directory(options.set, options.run)
        report = {**measure(root, options.rates), "clock": clock}
    except UserError as error:
        print(f"benchmark_quickstart: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_STATUS
    print(text(report))
    if options.json:
        write_json(options.json, report)
    return 0


def run_quickstart(overrides: Sequence[str], directory: Path | None) -> tuple[int, dict[str, float]]:
    """`npd run` to its end.

    Returns:
        Its exit status; seconds by the clock with the report and the exit, and cores that others used meanwhile.

    Raises:
        UserError: the models are not there, or something ran in the directory before.
    """
    config_file, overrides = QUICKSTART / "quickstart.toml", _overrides(overrides, directory)
    config = load_config(config_file, overrides)
    run = RunDirectory(Path(config.run_directory))
    check_directory(run, config)
    if run.metrics("supervisor").is_file():
        raise UserError(f"run_directory = {run.root}: holds a run; --run must name a new folder, --of takes that run")
    _check_models(config)
    sets = [word for override in overrides for word in ("--set", override)]
    done = measured([sys.executable, "-m", "megatron_npd.cli", "run", str(config_file), *sets])
    return done.status, {"seconds": done.seconds, "cores_used_by_others": done.cores_used_by_others}


def measure(root: Path, rates_from: Path) -> dict[str, Any]:
    """Everything that is reported about a finished run; the speed of matrix products is measured now.

    Raises:
        UserError: it is no run directory, the run has not finished, or the rates cannot be read.
    """
    run = RunDirectory(root)
    config, plan = finished_run(run)
    records = read_metrics(run.metrics("trainer").parent)
    courses = {MEASURED: measured_course(records)}
    for name, source in ((BY_RATES, rates_from), (BY_OWN_RATES, root)):
        courses[name] = estimated_course(config, plan, source)
    seconds = {name: seconds_by_phase(course) for name, course in courses.items()}
    balances = {name: rounds_balance(course, plan) for name, course in courses.items()}
    summary = summarise(run, config)
    return {
        "run": str(root),
        "rates": str(rates_from),
        "machine": machine(config),
        "provenance": read_json(run.provenance),
        "dtype": config.models.dtype,
        "supervisor_starts": _count(records, Event.START),
        "restarts": _count(records, Event.RESTART),
        "seconds": seconds,
        "ratios": {name: _ratios(seconds[name], seconds[MEASURED]) for name in (BY_RATES, BY_OWN_RATES)},
        "rounds": {
            name: asdict(balance) | {"reading_per_training": balance.reading_per_training}
            for name, balance in balances.items()
        },
        **{key: summary[key] for key in summary if key.startswith("heldout_kl")},
        "near_policy_kl": summary["near_policy_kl"],
        "near_policy_kl_limit": config.near_policy.kl_limit,
        **{key: summary[f"rollouts_{key}"] for key in ("generated", "kept", "rejected")},
    }


def finished_run(run: RunDirectory) -> tuple[Config, Plan]:
    """Configuration and plan of a run that has finished.

    Raises:
        UserError: it is no run directory, or has not.
    """
    if not run.config.is_file():
        raise UserError(f"--of {run.root}: no config.toml in it; must be a run directory")
    config = load_config(run.config)
    try:
        plan = plan_of(run, config)
    except OSError as error:
        raise UserError(f"--of {run.root}: cannot read {error.filename}: {error.strerror}") from None
    if not run.student.is_dir() or not run.evaluation(plan.final_version).is_file():
        raise UserError(f"--of {run.root}: has not finished; `npd status` says how far it is")
    return config, plan


def estimated_course(config: Config, plan: Plan, rates_from: Path) -> Course:
    """What the cost model says about a configuration.

    Raises:
        UserError: the rates cannot be read.
    """
    rates, workers = read_rates(rates_from), workers_of(config)
    return simulated_course(simulate(workload(config, plan, rates), rates, workers), rates, workers)


def seconds_by_phase(course: Course) -> dict[str, float]:
    """Lines of the table: busy seconds, by kind of work in the order of KINDS, and what makes them add up."""
    seconds: dict[str, float] = {}
    for (kind, of), busy in course.busy().items():
        label = SUMMED.get(kind, f"{kind}: {of}")
        seconds[label] = seconds.get(label, 0.0) + busy
    ordered = {label: seconds[label] for label in sorted(seconds, key=_place)}
    return ordered | {SIDE_BY_SIDE: -course.side_by_side, IDLE: course.idle, TOTAL: course.seconds}


def machine(config: Config) -> dict[str, Any]:
    """This machine; GFLOP/s of a matrix product for each number of threads that a role has, in its environment."""
    roles = {"trainer": config.training, "annotator": config.annotator, "rollout": config.rollout}
    environments = {layout.threads: role_environment(config, role) for role, layout in roles.items()}
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return {
        "cpu": processor(info),
        "extensions": [flag for flag in EXTENSIONS if re.search(rf"^(flags|Features)\s*:.*\b{flag}\b", info, re.M)],
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],  # of the last minute: before the products
        "hostname": platform.node(),
        "matrix_product": list(PRODUCT),
        "gflops": {str(n): _products_in_a_child(n, environments[n]) for n in sorted(environments)},
    }


def processor(cpuinfo: str) -> str:
    """Name of the processor in the text of /proc/cpuinfo; Arm's has none."""
    found = re.search(r"^model name\s*: (.*)$", cpuinfo, re.M)
    return found.group(1).strip() if found else platform.machine()


def matrix_products(threads: int) -> dict[str, dict[str, float]]:
    """GFLOP/s of PRODUCT by dtype: median and best of REPEATS after a warm-up, in this process."""
    import torch

    torch.set_num_threads(threads)
    rows, inner, columns = PRODUCT
    gflop = 2e-9 * rows * inner * columns
    return {
        dtype: {"median": gflop / statistics.median(seconds), "best": gflop / min(seconds)}
        for dtype, seconds in product_seconds(PRODUCT, warmups=3, rounds=REPEATS).items()
    }


def text(report: dict[str, Any]) -> str:
    """The report for a reader."""
    before, warmed_up, after = (_number(report[f"heldout_kl_{when}"]) for when in ("before", "after_warmup", "after"))
    drift, rejected = report["near_policy_kl"], report["rejected"] or {}
    why = ", ".join(f"{count} {reason}" for reason, count in rejected.items() if count)
    lines = [
        *_machine_lines(report),
        "",
        *table(report["seconds"], report["ratios"], report["rates"]),
        "",
        *_rounds_lines(report["rounds"]),
        "",
        f"held-out KL, nats a token: {before} before, {warmed_up} after warm-up, {after} after the rounds, which take "
        f"{_percent(report['heldout_kl_reduction']['rounds'])} of it away",
        f"near-policy KL: {_number(drift and drift['max'])} at most (limit {report['near_policy_kl_limit']:g})",
        f"rollouts: {report['kept']} of {report['generated']} kept; rejected: {why or 'none'}",
    ]
    return "\n".join(lines)


def table(seconds: dict[str, dict[str, float]], ratios: dict[str, dict[str, float | None]], rates: str) -> list[str]:
    """Phases down, courses across; after each estimate its ratio to what was measured."""
    estimates = list(ratios)
    labels = sorted(dict.fromkeys(label for column in seconds.values() for label in column), key=_place)
    lines = [
        f"busy seconds; a ratio is estimated / measured; the rates are those of {rates}",
        f"{'':<38}{MEASURED:>10}" + "".join(f"{name:>20}{'ratio':>7}" for name in estimates),
    ]
    for label in labels:
        line = f"{label:<38}{_seconds(seconds[MEASURED].get(label)):>10}"
        for name in estimates:
            ratio = ratios[name].get(label)
            line += f"{_seconds(seconds[name].get(label)):>20}{'-' if ratio is None else f'{ratio:.2f}':>7}"
        lines.append(line)
    return lines


def _machine_lines(report: dict[str, Any]) -> list[str]:
    here, there, clock = report["machine"], report["provenance"], report["clock"]
    packages = there.get("packages") or {}
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "megatron-core") if name in packages)
    lines = [
        f"{here['cpu']}, {here['cores']} cores, {' '.join(here['extensions'])}; load {here['load']:.1f} now",
        f"run {report['run']}: {report['dtype']}, {versions or 'versions unknown'}, "
        f"commit {(there.get('git_commit') or 'unknown')[:12]}",
    ]
    for threads, rates in here["gflops"].items():
        speeds = ", ".join(f"{dtype} {rate['median']:.0f} (best {rate['best']:.0f})" for dtype, rate in rates.items())
        rows, inner, columns = here["matrix_product"]
        lines.append(f"product [{rows},{inner}]x[{inner},{columns}] at threads = {threads}, GFLOP/s: {speeds}")
    if clock:
        others = f"others used {clock['cores_used_by_others']:.1f} cores meanwhile"
        lines.append(f"npd run by the clock, with its report: {clock['seconds']:.1f} s; {others}")
    if (there.get("hostname"), there.get("cpu_count")) != (here["hostname"], os.cpu_count()):
        of = f"{there.get('hostname')}, {there.get('cpu_count')} cores"
        lines.append(f"the run is of another machine, {of}; products and the taking of turns are those of this one")
    if report["supervisor_starts"] > 1 or report["restarts"]:
        lines.append(
            f"npd run was started {report['supervisor_starts']} times, roles again {report['restarts']} times: what "
            "was done again counts again, and a pause is idle"
        )
    return lines


def _rounds_lines(rounds: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"{'the rounds alone, busy seconds':<38}" + _columns(list(rounds))]
    for kind in ("annotation", "evaluation", "training"):
        lines.append(f"{kind:<38}" + _columns([f"{balance[kind]:.1f}" for balance in rounds.values()]))
    shares = [f"{balance['reading_per_training']:.2f}" for balance in rounds.values()]
    return [*lines, f"{'(annotation + evaluation) / training':<38}" + _columns(shares)]


def _columns(cells: Sequence[str]) -> str:
    """The cells below those of `table`."""
    measured, *estimates = cells
    return f"{measured:>10}" + "".join(f"{cell:>20}{'':7}" for cell in estimates)


def _place(label: str) -> int:
    """Where a line of the table belongs."""
    last = (SIDE_BY_SIDE, IDLE, TOTAL)
    if label in last:
        return len(KINDS) + last.index(label)
    return KINDS.index(KIND_OF_LABEL.get(label, label.partition(":")[0]))


def _ratios(estimated: dict[str, float], measured: dict[str, float]) -> dict[str, float | None]:
    return {
        label: estimated[label] / seconds if seconds and label in estimated else None
        for label, seconds in measured.items()
    }


def _count(records: Sequence[dict[str, Any]], event: str) -> int:
    return sum((record.get("role"), record.get("event")) == ("supervisor", event) for record in records)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{share:.1%}"


def _products_in_a_child(threads: int, environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """`matrix_products` in a process of its own: OpenMP's settings are read when torch is imported."""
    command = [sys.executable, __file__, "--matrix-products", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return json.loads(done.stdout)


def _check_models(config: Config) -> None:
    """The models are whole; of one that is not there at all, say what makes it."""
    for folder in (config.models.teacher, config.models.student):
        if not Path(folder).is_dir():
            make = f"python {QUICKSTART / 'prepare_models.py'} --output runs/models"
            raise UserError(f"{folder}: no such folder; the quickstart's models are made by `{make}`")
    check_models(config)


def _overrides(overrides: Sequence[str], directory: Path | None) -> list[str]:
    return [*overrides, *([f"run_directory={json.dumps(str(directory))}"] if directory else [])]


def _run_directory(overrides: Sequence[str], directory: Path | None) -> Path:
    return Path(load_config(QUICKSTART / "quickstart.toml", _overrides(overrides, directory)).run_directory)


def _check_options(options: argparse.Namespace) -> None:
    if options.of and (options.set or options.run):
        raise UserError(f"--of {options.of}: runs nothing; must be without --run and --set")
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: the folder does not exist")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the run")
    parser.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: the quickstart's)")
    parser.add_argument("--of", type=Path, metavar="RUN", help="run nothing: the figures of this finished run")
    text = f"rates for the estimate, or a run that has them (default: {RATES})"
    parser.add_argument("--rates", type=Path, default=RATES, metavar="FILE|RUN", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    parser.add_argument("--matrix-products", type=int, help=argparse.SUPPRESS)  # the child with a role's threads
    return parser


if __name__ == "__main__":
    sys.exit(main())
