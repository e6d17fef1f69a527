"""What a round costs beyond its tokens: everything between two rounds that is neither sampling, scoring nor training.

    python tools/benchmark_rounds.py CONFIG [--set rounds.count=51] [--keep FOLDER]
    python tools/benchmark_rounds.py RUN

A round lasts from the last optimizer step of the one before it to its own last step. Its overhead is what is left of
that when the seconds are taken away in which a unit was sampled or annotated, or a step was computed, by anybody. The
first round is left out: roles start in it. What records say about the overhead is named (publication, checkpoint,
refresh of the sidecar, snapshot of the annotator, evaluation); the rest is waiting for a poll, files, and looking.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_npd.process.metrics import busy_span, read_metrics
from megatron_npd.roles import TRAINER
from megatron_npd.schema import Event

Span = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, help="a configuration, which is run, or the directory of a run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, as in npd run")
    parser.add_argument("--keep", type=Path, help="run directory to keep; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.place.is_dir():
        show(arguments.place)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch) / "run"
        settings = [*arguments.set, f"run_directory={folder}"]
        options = [part for setting in settings for part in ("--set", setting)]
        subprocess.run([sys.executable, "-m", "megatron_npd.cli", "run", str(arguments.place), *options], check=True)
        show(folder)


def show(run: Path) -> None:
    """Print the overhead of a run's rounds."""
    records = read_metrics(run / "metrics")
    rounds = rounds_of(records)
    if not rounds:
        sys.exit(f"{run}: must have two rounds that were trained on; the first is not counted")
    overheads = [overhead(span, records) for span in rounds]
    lasted = [end - begin for begin, end in rounds]
    print(f"{len(rounds)} rounds, median seconds of one: {statistics.median(lasted):.3f}")
    print(f"overhead: median {statistics.median(overheads):.3f}, mean {statistics.mean(overheads):.3f}, "
          f"largest {max(overheads):.3f}")  # fmt: skip
    for name, seconds in sorted(named(rounds, records).items(), key=lambda item: -item[1]):
        print(f"  {name:24}{seconds / len(rounds):8.3f} a round")


def rounds_of(records: list[dict[str, Any]]) -> list[Span]:
    """From the last step of a round to the last step of the next, Unix seconds; all rounds but the first."""
    ends: dict[str, float] = {}
    for record in records:
        if (record["role"], record["event"]) == (TRAINER, Event.STEP) and record["stage"].startswith("round_"):
            ends[record["stage"]] = record["time"]
    last = [ends[stage] for stage in sorted(ends)]
    return list(itertools.pairwise(last))


def overhead(span: Span, records: list[dict[str, Any]]) -> float:
    """Seconds of a span in which nobody sampled, scored or trained."""
    work = (busy_span(record) for record in records if record["event"] in (Event.UNIT, Event.STEP))
    return span[1] - span[0] - covered(span, [one for one in work if one])


def covered(span: Span, parts: Iterable[Span]) -> float:
    """Seconds of a span that parts of it, which may overlap, cover."""
    total, until = 0.0, span[0]
    for begin, end in sorted(parts):
        begin, end = max(begin, until), min(end, span[1])
        if end > begin:
            total, until = total + end - begin, end
    return total


def named(rounds: list[Span], records: list[dict[str, Any]]) -> dict[str, float]:
    """Busy seconds of everything else during the rounds, by role and event; they may overlap with work."""
    seconds: dict[str, float] = defaultdict(float)
    for record in records:
        busy = busy_span(record)
        if busy and record["event"] not in (Event.UNIT, Event.STEP):
            seconds[f"{record['role']} {record['event']}"] += covered((rounds[0][0], rounds[-1][1]), [busy])
    return {name: total for name, total in seconds.items() if total}


if __name__ == "__main__":
    main()
