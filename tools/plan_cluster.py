#!/usr/bin/env python3
"""How long a run takes on 8 to 1,024 GPUs, how they are best divided among the roles, and who then waits.

    python tools/plan_cluster.py examples/openpangu_7b_to_1b/run.toml --rates runs/trial --plot plan.png

Simulates trainer, annotators and sidecars as queues (`megatron_npd.estimates.simulation`) from rates that a run has
measured (its directory) or that a TOML file gives (`--write-rates` shows one), for each number of GPUs in every
division worth trying. A worker's rate is taken to be the same however many there are: what reducing gradients over
many replicas costs is `trainer.step_seconds` of the rates.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.buffer.plan import make_plan
from megatron_npd.config import Config, load_config
from megatron_npd.errors import UserError
from megatron_npd.estimates.division import Division, Sizes, best_division
from megatron_npd.estimates.rates import Rates, read_rates
from megatron_npd.estimates.workload import workload
from megatron_npd.process.durations import duration
from megatron_npd.roles import ROLES

SIZES = "8,16,32,64,128,256,512,1024"


@dataclass(frozen=True)
class Plan:
    """The best division of a number of GPUs."""

    gpus: int
    used: int
    division: Division


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configuration (TOML)")
    parser.add_argument("--rates", required=True, metavar="FILE|RUN", help="rates, or a run directory that has them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--gpus", default=SIZES, metavar="N,N,...", help=f"numbers of GPUs (default {SIZES})")
    parser.add_argument("--plot", metavar="FILE", help="draw wall time and idle shares (.png, .svg, .pdf)")
    parser.add_argument("--write-rates", metavar="FILE", help="write the rates as TOML, to be changed and given again")
    options = parser.parse_args(arguments)
    try:
        config, rates = load_config(options.config, options.set), read_rates(Path(options.rates))
        if options.write_rates:
            Path(options.write_rates).write_text(rates.to_toml(), encoding="utf-8")
        plans = [plan(config, rates, gpus) for gpus in _numbers(options.gpus)]
    except UserError as error:
        print(f"plan_cluster: error: {error}", file=sys.stderr)
        return 2
    print(table(plans))
    if plans[-1].used < plans[-1].gpus:
        print(
            f"More than {plans[-1].used} GPUs have nothing to do: work is divided by rollout.samples_per_unit = "
            f"{config.rollout.samples_per_unit} and training.global_batch_size = {config.training.global_batch_size}."
        )
    if options.plot:
        draw(plans, Path(options.plot), f"{Path(options.config).parent.name}: rates of {options.rates}")
    return 0


def plan(config: Config, rates: Rates, gpus: int) -> Plan:
    """The best division of so many GPUs.

    Raises:
        UserError: they are too few for one worker of each role, or a prompt file cannot be read.
    """
    sizes = Sizes.of(config)
    prompts = (_lines(Path(file)) for file in (config.prompts.train, config.prompts.heldout))
    work = workload(config, make_plan(config, *prompts), rates)
    best = best_division(work, rates, sizes, gpus)
    if best is None:
        needed = sizes.replica + sizes.annotator + sizes.sidecar
        raise UserError(f"--gpus {gpus}: must be at least {needed}: one replica, one annotator and one sidecar")
    return Plan(gpus, sizes.gpus(best.workers), best)


def table(plans: list[Plan]) -> str:
    """One line a number of GPUs."""
    lines = [
        f"{'GPUs':>6} {'used':>6} {'replicas':>9} {'annotators':>11} {'sidecars':>9} {'wall':>11} {'GPU-hours':>10}"
        f"   idle: {'trainer':>8} {'annotator':>10} {'rollout':>8}"
    ]
    for item in plans:
        workers, timeline = item.division.workers, item.division.timeline
        widths = zip(ROLES, (8, 10, 8), strict=True)
        idle = " ".join(f"{timeline.idle_share(role):>{width}.0%}" for role, width in widths)
        lines.append(
            f"{item.gpus:>6} {item.used:>6} {workers.replicas:>9} {workers.annotators:>11} {workers.sidecars:>9} "
            f"{duration(timeline.seconds):>11} {item.gpus * timeline.seconds / 3600:>10.1f}         {idle}"
        )
    return "\n".join(lines)


def draw(plans: list[Plan], file: Path, title: str) -> None:
    """Wall time over GPUs, beside what perfect scaling of the smallest would be; idle share of each role."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpus = [item.gpus for item in plans]
    hours = [item.division.timeline.seconds / 3600 for item in plans]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 7), constrained_layout=True)
    above.loglog(gpus, hours, "o-", label="best division")
    above.loglog(gpus, [hours[0] * gpus[0] / count for count in gpus], "--", color="gray", label="perfect scaling")
    above.set(ylabel="wall time, hours", title=title)
    above.legend()
    for role in ROLES:
        below.semilogx(gpus, [100 * item.division.timeline.idle_share(role) for item in plans], "o-", label=role)
    below.set(xlabel="GPUs", ylabel="idle, % of the run", ylim=(0, 100), xticks=gpus, xticklabels=map(str, gpus))
    below.minorticks_off()
    below.legend()
    figure.savefig(file)
    pyplot.close(figure)


def _lines(file: Path) -> int:
    try:
        return sum(1 for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"{file}: cannot read the prompts: {error.strerror}") from None


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"--gpus {text}: must be numbers of GPUs, as in 8,16,32")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
