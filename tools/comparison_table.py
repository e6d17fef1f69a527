"""What `compare_trl.py` prints: Markdown from the figures of finished runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from megatron_npd.estimates.phases import ANNOTATION, EVALUATION, ROLLOUTS, START, TRAINING

OURS, TRL, BEFORE = "megatron_npd", "TRL GKDTrainer", "before"
"""`system` of a run's figures; BEFORE: the student both start from."""
KINDS = (ROLLOUTS, ANNOTATION, TRAINING, EVALUATION, START)
OTHER, IDLE = "publications, checkpoints, refreshes, finish", "nobody is busy"

Figures = dict[str, Any]
"""Of one finished run: what its JSON file holds."""


def text(runs: list[Figures]) -> str:
    """Markdown: both sides, TRL's rates, and where our time goes."""
    before, ours_runs = runs[0], [run for run in runs if run["system"] == OURS]
    theirs = [run for run in runs if run["system"] == TRL]
    trials = [run for run in theirs if run["beside"] == ours_runs[0]["name"]]
    best = best_rate(trials)
    best_runs = [run for run in theirs if run["rate"] == best]
    return "\n\n".join(
        [
            "\n".join(_both_sides(before, ours_runs, best_runs)),
            gain_sentence(before, ours_runs, best_runs),
            "TRL by learning rate, beside the first run of ours:\n\n" + "\n".join(_by_rate(before, trials, best)),
            "Where our seconds go (busy, all roles):\n\n" + "\n".join(_by_kind(ours_runs)),
        ]
    )


def gains(before: Figures, runs: Sequence[Figures]) -> list[float]:
    """How much nearer to the teacher each came, nats a token."""
    return [before["heldout_kl"] - run["heldout_kl"] for run in runs]


def gain_sentence(before: Figures, ours_runs: Sequence[Figures], theirs: Sequence[Figures]) -> str:
    """The ratio of the mean gains, or why there is none."""
    mine, other = (statistics.fmean(gains(before, runs)) for runs in (ours_runs, theirs))
    said = f"Mean gain in held-out KL: ours {mine:+.4f}, TRL's best rate {other:+.4f} nats a token"
    return f"{said}: **{mine / other:.1f} times**." if other > 0 else f"{said}: TRL's gained nothing, so no ratio."


def _both_sides(before: Figures, ours_runs: Sequence[Figures], theirs: Sequence[Figures]) -> list[str]:
    start, teacher = before["heldout_kl"], before["teacher"]
    answers = f"right answers of {before['asked']} (before {before['right']}, teacher {teacher['right']})"
    chosen, chance = f"before {before['chosen']}, teacher {teacher['chosen']}", f"by chance {before['by_chance']:.0f}"
    rows: list[tuple[str, Callable[[Figures], float], str]] = [
        (f"held-out KL, nats a token (before: {start:.4f})", lambda run: run["heldout_kl"], ".4f"),
        ("gain in it", lambda run: start - run["heldout_kl"], "+.4f"),
        (answers, lambda run: run["right"], ".0f"),
        (f"right choices of {before['offered']} ({chosen}, {chance})", lambda run: run["chosen"], ".0f"),
        ("equal likeliest token, %", lambda run: 100 * run["top1_agreement"], ".1f"),
        ("wall seconds", lambda run: run["seconds"], ".0f"),
        ("response tokens sampled", lambda run: run["generated_tokens"], ".0f"),
        ("response tokens trained on, epochs counted", lambda run: run["trained_tokens"], ".0f"),
        ("optimizer steps", lambda run: run["steps"], ".0f"),
        ("cores others used", lambda run: run["cores_used_by_others"], ".1f"),
    ]
    lines = [f"| median (each) | {OURS} | {TRL}, rate {theirs[0]['rate']:g} |", "|---|---|---|"]
    for label, value, form in rows:
        cells = " | ".join(_median_and_each([value(run) for run in runs], form) for runs in (ours_runs, theirs))
        lines.append(f"| {label} | {cells} |")
    return lines


def _by_rate(before: Figures, trials: Sequence[Figures], best: float) -> list[str]:
    lines = ["| rate | held-out KL | gain | right choices | steps | seconds |", "|---|---|---|---|---|---|"]
    for run in trials:
        rate = f"**{run['rate']:g}**" if run["rate"] == best else f"{run['rate']:g}"
        [gain] = gains(before, [run])
        kl, seconds = run["heldout_kl"], run["seconds"]
        lines.append(f"| {rate} | {kl:.4f} | {gain:+.4f} | {run['chosen']} | {run['steps']} | {seconds:.0f} |")
    return lines


def _by_kind(ours_runs: Sequence[Figures]) -> list[str]:
    lines = ["| | seconds, median (each) |", "|---|---|"]
    for kind in (*KINDS, OTHER, IDLE):
        each = [run["seconds_by_kind"].get(kind, 0.0) for run in ours_runs]
        lines.append(f"| {kind} | {_median_and_each(each, '.0f')} |")
    return lines


def _median_and_each(values: Sequence[float], form: str) -> str:
    each = f" ({', '.join(format(value, form) for value in values)})" if len(values) > 1 else ""
    return format(statistics.median(values), form) + each


def best_rate(trials: Sequence[Figures]) -> float:
    """The learning rate whose student ended nearest to the teacher."""
    return min(trials, key=lambda run: run["heldout_kl"])["rate"]
