"""The plots of a report, each a matplotlib figure, or None where there is nothing to draw yet."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from megatron_npd.process.metrics import busy_span
from megatron_npd.roles import TEACHER
from megatron_npd.run_directory import HELDOUT_STAGE, WARMUP_STAGE
from megatron_npd.schema import Event, StepMetric, Verdict

Record = dict[str, Any]
Scores = dict[str, np.ndarray]

INK, MUTED, BLUE, ORANGE, GREEN, RED, GREY = "#1c2430", "#667085", "#2563eb", "#d97706", "#059669", "#dc2626", "#98a2b3"
VERDICTS = {Verdict.KEPT: GREEN, Verdict.DEGENERATE: ORANGE, Verdict.COGNITIVE_DISCONNECT: RED}
STAGES = {HELDOUT_STAGE: GREY, WARMUP_STAGE: "#e5a83b"}
NO_STAGE = "starting, moving weights, evaluating"
ROUNDS = (BLUE, "#14b8a6", "#7c3aed", "#0ea5e9")
SCATTER_POINTS, SCATTER_PANELS = 3000, 4
STYLE = {
    "axes.edgecolor": "#d5dae1",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,
    "svg.hashsalt": "npd",
    "figure.constrained_layout.use": True,
}


def distinct_steps(records: list[Record]) -> list[Record]:
    """Optimizer steps by number; of one redone after a restart, the last record."""
    steps = {record["step"]: record for record in records if record.get("event") == Event.STEP and "step" in record}
    return [steps[number] for number in sorted(steps)]


def plot_heldout(kl_by_version: dict[str, float | None], settings: dict[str, Any]) -> Figure | None:
    """Held-out KL of each version, its value written beside it."""
    points = [(int(version), kl) for version, kl in kl_by_version.items() if kl is not None]
    if not points:
        return None
    figure, axes = _axes(3.0, "policy version", "nats a token")
    versions, values = zip(*sorted(points), strict=True)
    axes.plot(versions, values, color=BLUE, marker="o", linewidth=2)
    has_warmup = settings.get("warmup_source") == "data" or settings.get("warmup_samples_per_prompt")
    first_round = 1 if has_warmup else 0
    for version, value in zip(versions, values, strict=True) if len(points) <= 12 else ():
        axes.annotate(f"{value:.3f}", (version, value), (5, 7), textcoords="offset points", color=INK)
    if len(points) <= 12:
        names = {0: "before", 1: "warm-up"} if first_round else {0: "before"}
        axes.set_xticks(versions, [f"v{v}\n{names.get(v, f'round {v - first_round}')}" for v in versions])
    axes.set_ylim(0, max(values) * 1.18)
    axes.margins(x=0.08)
    return figure


def plot_evaluations(evaluations: dict[str, dict[str, Any]]) -> Figure | None:
    """Accuracy by version with its 95 % interval, a colour for each evaluation; the teacher's dashed, where known.
    Points of several evaluations stand side by side."""
    if not any(evaluations.values()):
        return None
    figure, axes = _axes(3.2, "policy version", "right answers, %")
    colours = (BLUE, ORANGE, GREEN, RED, *ROUNDS[1:])
    ticks: set[int] = set()
    for place, (name, results) in enumerate(evaluations.items()):
        colour = colours[place % len(colours)]
        shift = 0.04 * (place - (len(evaluations) - 1) / 2)
        if teacher := results.get(TEACHER):
            axes.axhline(100 * teacher["accuracy"], color=colour, linestyle="--", linewidth=1)
        versions = sorted(int(version) for version in results if version != TEACHER)
        ticks.update(versions)
        shares = np.array([100 * results[str(v)]["accuracy"] for v in versions])
        ends = np.array([[100 * end for end in results[str(v)]["wilson_95"]] for v in versions]).reshape(-1, 2)
        axes.errorbar(
            np.array(versions) + shift, shares, np.abs(ends.T - shares), color=colour, marker="o", capsize=3, label=name
        )
    if len(ticks) <= 12:
        axes.set_xticks(sorted(ticks), [f"v{version}" for version in sorted(ticks)])
    axes.set_ylim(0, 100)
    axes.margins(x=0.08)
    axes.legend(ncols=3, loc="best")
    return figure


def plot_loss(steps: list[Record]) -> Figure | None:
    """Loss, CE and KD by step over shaded stages."""
    series = [(StepMetric.CE, "CE", GREY), (StepMetric.KD, "KD", ORANGE), (StepMetric.LOSS, "loss", BLUE)]
    lines = [(label, colour, *_series(steps, key)) for key, label, colour in series]
    if not any(len(x) for _, _, x, _ in lines):
        return None
    figure, axes = _axes(3.4, "optimizer step", "nats a token")
    _shade_stages(axes, steps)
    for label, colour, x, y in lines:
        axes.plot(x, y, color=colour, linewidth=1.8 if label == "loss" else 1.1, label=label, **_marker(x))
    axes.legend(ncols=3, loc="upper right")
    axes.margins(x=0)
    return figure


def plot_scatter(scores: Scores) -> Figure | None:
    """IFD of student (x) and teacher (y) with the zones, one panel a round; at most the first and the last rounds."""
    finite = np.isfinite(scores["ifd_student"]) & np.isfinite(scores["ifd_teacher"])
    rounds = np.unique(scores["round"][finite])
    if len(rounds) > SCATTER_PANELS:
        rounds = np.concatenate([rounds[: SCATTER_PANELS // 2], rounds[-SCATTER_PANELS // 2 :]])
    if not len(rounds):
        return None
    right, top = (max(0.5, 1.1 * np.quantile(scores[f"ifd_{m}"][finite], 0.995)) for m in ("student", "teacher"))
    columns = min(len(rounds), 2)
    figure = Figure(figsize=(8, 3.9 * -(-len(rounds) // columns)))
    panels = figure.subplots(-(-len(rounds) // columns), columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel in panels[len(rounds) :]:
        panel.set_axis_off()
    for index, panel in zip(rounds, panels, strict=False):
        rows = np.flatnonzero(finite & (scores["round"] == index))
        shown = np.random.default_rng(0).permutation(rows)[:SCATTER_POINTS]
        colours = [VERDICTS.get(verdict, GREY) for verdict in scores["verdict"][shown]]
        x = np.array([0.0, right])
        for lowest, highest in _kept_bands(scores, rows):
            panel.fill_between(x, x + lowest, x + highest, color=GREEN, alpha=0.07, linewidth=0)
        for offset in _borders(scores, rows):
            panel.plot(x, x + offset, color=INK, linewidth=1, linestyle="-" if offset == 0 else "--")
            end = min(right, top - offset)  # where the line leaves the panel
            place = (0.9 * end, 0.9 * end + offset)
            panel.annotate(f"Δ = {offset:g}", place, (-4, 2), textcoords="offset points", ha="right")
        panel.scatter(
            scores["ifd_student"][shown],
            scores["ifd_teacher"][shown],
            s=9,
            c=colours,
            alpha=0.65,
            linewidths=0,
            rasterized=True,
        )
        panel.set(xlim=(0, right), ylim=(0, top), title=f"round {index + 1}: {len(rows):,} samples")
        panel.set(xlabel="IFD student", ylabel="IFD teacher")
    _verdict_legend(figure, scores["verdict"][finite])
    return figure


def _kept_bands(scores: Scores, rows: np.ndarray) -> list[tuple[float, float]]:
    """The bands of Δ-IFD that were kept where these samples were judged: rounds may have had several rules."""
    bands = np.stack([scores["lowest_kept"][rows], scores["highest_kept"][rows]], axis=1)
    return [(float(low), float(high)) for low, high in np.unique(bands[np.isfinite(bands).all(axis=1)], axis=0)]


def _borders(scores: Scores, rows: np.ndarray) -> list[float]:
    """0, which means something by itself, and the ends of the bands; ascending."""
    return sorted({0.0, *(end for band in _kept_bands(scores, rows) for end in band)})


def plot_histogram(scores: Scores) -> Figure | None:
    """Δ-IFD of every scored sample, stacked by verdict."""
    finite = np.isfinite(scores["delta_ifd"])
    delta, verdicts = scores["delta_ifd"][finite], scores["verdict"][finite]
    if not len(delta):
        return None
    low, high = np.quantile(delta, [0.005, 0.99])
    borders = _borders(scores, np.flatnonzero(finite))
    low, high = min(low, -0.1), max(high, 1.1 * borders[-1] if borders[-1] > 0 else 0.1)
    width = (high - low) / min(60, 15 + len(delta) // 20)
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)  # 0 is one of them
    outside = int(np.sum((delta < edges[0]) | (delta > edges[-1])))
    groups = [(colour, delta[verdicts == verdict]) for verdict, colour in VERDICTS.items()]
    groups.append((GREY, delta[~np.isin(verdicts, list(VERDICTS))]))
    figure, axes = _axes(3.2, "Δ-IFD" + (f"  ({outside:,} samples lie outside)" if outside else ""), "samples")
    axes.hist([part for _, part in groups], bins=edges, stacked=True, color=[colour for colour, _ in groups])
    for value in borders:
        axes.axvline(value, color=INK, linewidth=1, linestyle="-" if value == 0 else "--")
        axes.annotate(f"{value:g}", (value, 1), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points")
    _verdict_legend(figure, verdicts)
    return figure


def plot_roles(records: list[Record], steps: list[Record]) -> Figure | None:
    """Samples and trained tokens so far, over a Gantt chart of the roles; one time axis."""
    busy = [(record, *span) for record in records if (span := busy_span(record))]
    if not busy:
        return None
    begin = min(start for _, start, _ in busy)
    span = max(record["time"] for record, _, _ in busy) - begin
    unit, scale = next((name, n) for name, n in (("h", 3600), ("min", 60), ("s", 1)) if span > 3 * n or n == 1)
    busy.sort(key=lambda entry: entry[1])
    lanes = list(dict.fromkeys(record["role"] for record, _, _ in busy))
    figure = Figure(figsize=(8, 3.6 + 0.34 * len(lanes)))
    samples, tokens, gantt = figure.subplots(3, 1, sharex=True, height_ratios=[1.6, 1, 0.5 + 0.34 * len(lanes)])

    def cumulate(axes: Axes, chosen: list[Record], key: str, label: str, colour: str) -> None:
        x, y = _series(chosen, key, "time")
        axes.step((x - begin) / scale, np.cumsum(y), where="post", color=colour, label=label, linewidth=1.6)

    units = [r for r in records if r.get("event") == Event.UNIT]
    shown = [r for r in units if str(r.get("stage", "")).startswith("round_") and not r.get("given")]
    of_what = "the rounds" if shown else "the warm-up"
    shown = shown or [r for r in units if r.get("stage") == WARMUP_STAGE]
    cumulate(samples, [r for r in shown if "kept" not in r], "samples", "generated", BLUE)
    cumulate(samples, [r for r in shown if "kept" in r], "kept", "kept", GREEN)
    cumulate(tokens, steps, StepMetric.RESPONSE_TOKENS, "trained on", ORANGE)
    for axes, label in ((samples, f"samples of\n{of_what}"), (tokens, "response\ntokens")):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(loc="upper left")
    stages = list(dict.fromkeys(_stage(record) for record, _, _ in busy))
    for lane, role in enumerate(lanes):
        for stage in stages:
            mine = [(start, end) for r, start, end in busy if r["role"] == role and _stage(r) == stage]
            bars = [((start - begin) / scale, (end - start) / scale) for start, end in mine]
            gantt.broken_barh(bars, (lane - 0.36, 0.72), color=_stage_colour(stage), linewidth=0.4, rasterized=True)
    gantt.set(yticks=range(len(lanes)), yticklabels=lanes, ylim=(len(lanes) - 0.5, -0.5), xlabel=f"time, {unit}")
    gantt.grid(axis="y", visible=False)
    patches = [Patch(color=_stage_colour(stage), label=stage_name(stage)) for stage in stages[:8]]
    figure.legend(handles=patches, loc="outside lower center", ncols=4)
    return figure


def plot_drift(steps: list[Record], limit: float | None) -> Figure | None:
    """Near-policy KL by step of the rounds, with its limit."""
    rounds = [step for step in steps if str(step.get("stage", "")).startswith("round_")]
    x, y = _series(rounds, StepMetric.DRIFT)
    if not len(x):
        return None
    figure, axes = _axes(3.0, "optimizer step", "nats a token")
    _shade_stages(axes, rounds)
    axes.plot(x, y, color=BLUE, linewidth=1.6, **_marker(x))
    if limit is not None:
        axes.axhline(limit, color=RED, linestyle="--", linewidth=1)
        axes.annotate(f"limit {limit:g}", (0, limit), (6, 4), xycoords=("axes fraction", "data"), color=RED,
                      textcoords="offset points")  # fmt: skip
    axes.set_ylim(min(0.0, 1.1 * y.min()), 1.25 * max(y.max(), limit or 0.0))
    return figure


def _axes(height: float, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height))
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _series(records: list[Record], key: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """The finite values of a key and where they lie, float64 [n] each."""
    pairs = [(r[x], r[key]) for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2).T


def _marker(x: np.ndarray) -> dict[str, Any]:
    """A few points are marked: a line of one point would not show."""
    return {"marker": "o", "markersize": 3} if len(x) < 40 else {}


def _shade_stages(axes: Axes, steps: list[Record]) -> None:
    starts = [i for i in range(len(steps)) if i == 0 or steps[i].get("stage") != steps[i - 1].get("stage")]
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        first, last = steps[start]["step"] - 0.5, steps[end - 1]["step"] + 0.5
        stage = _stage(steps[start])
        axes.axvspan(first, last, color=_stage_colour(stage), alpha=0.09, linewidth=0)
        if len(starts) <= 6:
            axes.text(first, 1.01, f" {stage_name(stage)}", transform=axes.get_xaxis_transform(), color=MUTED, size=9)


def _stage(record: Record) -> str:
    """What a record is about: its stage, or that of the supervisor's phase."""
    return record.get("stage") or record.get("name") or NO_STAGE


def _stage_colour(stage: str) -> str:
    number = stage.removeprefix("round_")
    return ROUNDS[int(number) % len(ROUNDS)] if number.isdecimal() else STAGES.get(stage, "#475467")


def stage_name(stage: str) -> str:
    """Rounds count from 1 for people."""
    number = stage.removeprefix("round_")
    return f"round {int(number) + 1}" if number.isdecimal() else {WARMUP_STAGE: "warm-up"}.get(stage, stage)


def _verdict_legend(figure: Figure, verdicts: np.ndarray) -> None:
    labels = [(colour, words(verdict.name)) for verdict, colour in VERDICTS.items()] + [(GREY, "other reason")]
    present = {VERDICTS.get(verdict, GREY) for verdict in verdicts}
    patches = [Patch(color=colour, label=label) for colour, label in labels if colour in present]
    figure.legend(handles=patches, loc="outside lower center", ncols=4)


def words(name: str) -> str:
    return name.lower().replace("_", " ")
