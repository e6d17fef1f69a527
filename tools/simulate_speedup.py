#!/usr/bin/env python3
"""Where the published 8.1 times over on-policy distillation comes from, by the cost model: figures of docs/speedup.md.

    python tools/simulate_speedup.py [--plot docs/speedup.svg] [--json FILE]

`megatron_npd.estimates.speedup` is the model and says what it assumes; nothing is measured here. The hours by the clock
are those of the simulation of the roles (`megatron_npd.estimates.simulation`).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.estimates.speedup import (
    DEVICES,
    PUBLISHED,
    PUBLISHED_EPOCHS,
    PUBLISHED_SETS,
    PUBLISHED_SPEEDUP,
    DeviceHours,
    Engine,
    Lengths,
    Setting,
    batch_of,
    scheduled,
    simulated_hours,
    speedup,
    strict,
)
from megatron_npd.files import write_json

LIMIT = 4096
"""rollout.max_new_tokens of examples/openpangu_7b_to_1b/run.toml."""
PADDING = 2.8
"""Padded training against packed, measured: docs/benchmarks.md, "Trainer"."""
RECIPE_TOKENS = 8 * 32768
"""Of an optimizer step of that recipe."""
MEDIANS, SIGMAS = (200, 400, 800), (0.5, 1.0)
ENGINES = (Engine(), Engine(overhead=1.0), Engine(slots=64))
REFERENCE = Setting(Lengths(400.0, 1.0, LIMIT), padding=PADDING)
BATCHES = np.geomspace(64, 100_000, 60)
SETS = (1, 2, 5, 10)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw (.svg, .png, .pdf)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(argv)
    try:
        for key, file in (("--plot", options.plot), ("--json", options.json)):
            if file and not file.parent.is_dir():
                raise UserError(f"{key} {file}: the folder does not exist")
    except UserError as error:
        print(f"simulate_speedup: error: {error}", file=sys.stderr)
        return USAGE_STATUS
    found = figures()
    print(text(found))
    if options.json:
        write_json(options.json, found)
    if options.plot:
        draw(options.plot)
    return 0


def figures() -> dict[str, Any]:
    """Everything the page quotes."""
    batch = batch_of(PUBLISHED_SPEEDUP, REFERENCE)
    assert batch is not None
    steps = round(REFERENCE.responses / batch)
    return {
        "from_published_to_strict": [
            {"what": what, **_hours(cost), "times": cost.total / PUBLISHED.total} for what, cost in _steps(batch)
        ],
        "hours_by_the_clock": {
            "published": simulated_hours(PUBLISHED, PUBLISHED_SETS, PUBLISHED_EPOCHS // PUBLISHED_SETS, steps),
            "strict": simulated_hours(strict(batch, REFERENCE), PUBLISHED_EPOCHS * steps, 1, 1),
        },
        "batch_at_published_speedup": [
            {
                "slots": engine.slots, "overhead": engine.overhead,
                "median": median, "sigma": sigma, "mean": setting.lengths.mean,
                "responses": batch_of(PUBLISHED_SPEEDUP, setting),
                "at_the_recipes_batch": speedup(setting.batch(RECIPE_TOKENS), setting),
                "recipes_batch": setting.batch(RECIPE_TOKENS),
            }
            for engine in ENGINES for sigma in SIGMAS for median in MEDIANS
            for setting in [_setting(median, sigma, engine)]
        ],
        "schedules": [
            {"sets": sets, "device_hours": cost.total, "times": strict(batch, REFERENCE).total / cost.total}
            for sets in SETS for cost in [scheduled(sets, REFERENCE.responses, REFERENCE)]
        ],
    }  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """The tables of docs/speedup.md."""
    lengths, hours = REFERENCE.lengths, found["hours_by_the_clock"]
    lines = [
        f"Reference: lengths log-normal, median {lengths.median:.0f}, sigma {lengths.sigma:g}, cut at {lengths.limit} "
        f"(mean {lengths.mean:.0f}); prompts of {REFERENCE.prompt:.0f}; {REFERENCE.engine.slots} sequences at once; "
        f"{REFERENCE.responses:,.0f} responses a set; padded training {REFERENCE.padding:g} times packed.",
        "",
        "| device-hours | rollout | annotation | training | other | all | times |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["from_published_to_strict"]:
        cells = " | ".join(f"{row[key]:,.0f}" for key in ("rollout", "annotation", "training", "other", "total"))
        lines.append(f"| {row['what']} | {cells} | {row['times']:.1f} |")
    lines += [
        "",
        f"By the clock, {DEVICES} devices on whatever is to be done (simulated): {hours['published']:.1f} h against "
        f"{hours['strict']:.1f} h: {hours['strict'] / hours['published']:.1f} times.",
        "",
        f"| slots | overhead | σ | median | mean | responses a step for {PUBLISHED_SPEEDUP:g} times | recipe's step "
        "| times there |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["batch_at_published_speedup"]:
        at = f"{row['responses']:,.0f}" if row["responses"] else "none"
        lines.append(
            f"| {row['slots']} | {row['overhead']:g} | {row['sigma']:g} | {row['median']} | {row['mean']:.0f} | {at} | "
            f"{row['recipes_batch']:,.0f} | {row['at_the_recipes_batch']:.0f} |"
        )
    lines += ["", "| sets of responses in 10 epochs | device-hours | times faster than strict |", "|---|---|---|"]
    for row in found["schedules"]:
        lines.append(f"| {row['sets']} | {row['device_hours']:,.0f} | {row['times']:.1f} |")
    return "\n".join(lines)


def draw(file: Path) -> None:
    """Left: the speed-up over the responses of a step. Right: over the responses sampled at once, by schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from megatron_npd.report.plots import BLUE, GREEN, MUTED, ORANGE, RED, STYLE

    colours = (BLUE, ORANGE, GREEN, RED)
    with pyplot.rc_context(STYLE | {"svg.fonttype": "none"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
        for median, colour in zip(MEDIANS, colours, strict=False):
            for sigma, line in zip(SIGMAS, ("--", "-"), strict=True):
                setting = _setting(median, sigma, Engine())
                label = f"median {median}, σ {sigma:g}"
                left.plot(BATCHES, [speedup(b, setting) for b in BATCHES], line, color=colour, label=label)
        left.set(xlabel="responses of an optimizer step, 8 devices", ylabel="times faster than strictly on-policy")
        left.set_title("published schedule, by response lengths (tokens)")
        batch = batch_of(PUBLISHED_SPEEDUP, REFERENCE)
        assert batch is not None
        dearest = strict(batch, REFERENCE).total
        at_once = np.geomspace(batch, REFERENCE.responses, 40)
        for sets, colour in zip(SETS, colours, strict=True):
            times = [dearest / scheduled(sets, count, REFERENCE).total for count in at_once]
            right.plot(at_once, times, color=colour, label=f"{PUBLISHED_EPOCHS // sets} epochs on each response")
        right.set(xlabel="responses sampled between refreshes")
        right.set_title(f"schedules, against strict steps of {batch:,.0f} responses")
        for axes in (left, right):
            axes.axhline(PUBLISHED_SPEEDUP, color=MUTED, linewidth=1, linestyle=":")
            axes.set(xscale="log", yscale="log", ylim=(0.8, 100))
            axes.set_yticks([1, 2, 4, PUBLISHED_SPEEDUP, 16, 32, 64], ["1", "2", "4", "8.1", "16", "32", "64"])
            ticks = [count for count in (100, 300, 1000, 3000, 10_000, 30_000, 100_000) if count >= axes.get_xlim()[0]]
            axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
            axes.minorticks_off()
            axes.legend()
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


def _steps(batch: float) -> list[tuple[str, DeviceHours]]:
    """From the published run to a strictly on-policy one, a difference at a time."""
    packed, whole = replace(REFERENCE, padding=1.0), REFERENCE.responses
    fresh = scheduled(PUBLISHED_EPOCHS, whole, packed)
    unpacked = replace(fresh, training=fresh.training * PADDING)
    return [
        ("published: 2 sets of responses, 5 epochs on each", PUBLISHED),
        ("a fresh response every time: 10 sets", fresh),
        ("and nothing packed", unpacked),
        (f"and sampled step by step, {batch:,.0f} at a time: strictly on-policy", strict(batch, REFERENCE)),
    ]


def _setting(median: float, sigma: float, engine: Engine) -> Setting:
    return Setting(Lengths(float(median), sigma, LIMIT), padding=PADDING, engine=engine)


def _hours(cost: DeviceHours) -> dict[str, float]:
    named = {key: getattr(cost, key) for key in ("rollout", "annotation", "training", "other", "total")}
    assert all(map(math.isfinite, named.values()))
    return named


if __name__ == "__main__":
    sys.exit(main())
