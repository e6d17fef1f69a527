"""The report of a run: one self-contained `report.html`, no script, no network, readable on a phone.

A section is a heading, one sentence that says how to read the plot, and the plot as an SVG image inside the page.
What is not there yet says so: a running or broken run has a report too.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron_npd.files import write_atomically
from megatron_npd.process.durations import duration
from megatron_npd.report.plots import (
    STYLE,
    Record,
    Scores,
    distinct_steps,
    plot_drift,
    plot_evaluations,
    plot_heldout,
    plot_histogram,
    plot_loss,
    plot_roles,
    plot_scatter,
    stage_name,
    words,
)
from megatron_npd.roles import TEACHER


def render_report(summary: dict[str, Any], records: list[Record], scores: Scores, path: Path) -> None:
    """Write the page.

    Args:
        summary: of `report.summary.summarise`; any value may be None or absent.
        records: metrics of all roles, by time.
        scores: as `report.summary.collect_scores` gives them.
        path: `report.html`; it appears whole or stays as it was.
    """
    settings = summary.get("settings") or {}
    limit, steps = settings.get("kl_limit"), distinct_steps(records)
    asked = summary.get("evaluation") or {}
    with matplotlib.rc_context(STYLE):
        evaluated = [("Evaluations", READ_EVALUATIONS, plot_evaluations(asked))] if asked else []
        plots = [
            ("Held-out KL", READ_HELDOUT, plot_heldout(summary.get("heldout_kl_by_version") or {}, settings)),
            *evaluated,
            ("Training loss", READ_LOSS, plot_loss(steps)),
            ("Δ-IFD: what the filter saw", READ_SCATTER, plot_scatter(scores)),
            ("Δ-IFD: distribution", READ_HISTOGRAM, plot_histogram(scores)),
            ("Roles over time", READ_ROLES, plot_roles(records, steps)),
            ("Near-policy drift", READ_DRIFT, plot_drift(steps, limit)),
        ]
        sections = "".join(_section(*plot) for plot in plots)
    body = _headline(summary) + _round_table(summary) + _evaluation_table(asked) + sections + _details(summary)
    title = escape(f"Near-policy distillation: {summary.get('run', 'run')}")
    write_atomically(path, _filled(title, body).encode())


def _section(title: str, how_to_read: str, figure: Figure | None) -> str:
    """HTML of one plot; the image is an SVG of its own, so that ids of two plots cannot clash."""
    shown = '<p class="absent">Nothing to draw yet: no such data in the run directory.</p>'
    if figure is not None:
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", dpi=160, metadata={"Date": None})
        source = base64.b64encode(svg.getvalue()).decode()
        shown = f'<div class="plot"><img alt="{escape(title)}" src="data:image/svg+xml;base64,{source}"></div>'
    return f"<section><h2>{escape(title)}</h2><p>{escape(how_to_read)}</p>{shown}</section>\n"


def _headline(summary: dict[str, Any]) -> str:
    """The figures most readers came for."""
    has_rounds = (summary.get("settings") or {}).get("rounds_count") != 0
    path = ["heldout_kl_before", "heldout_kl_after"]
    if has_rounds and summary.get("heldout_kl_after_warmup") is not None:
        path.insert(1, "heldout_kl_after_warmup")
    kl = " → ".join(_figure(summary.get(key), ".3f") for key in path)
    reduction = (summary.get("heldout_kl_reduction") or {}).get("whole_run")
    kept, generated = summary.get("rollouts_kept"), summary.get("rollouts_generated")
    rejected = {reason: n for reason, n in (summary.get("rollouts_rejected") or {}).items() if n}
    reasons = ", ".join(f"{words(reason)} {n:,}" for reason, n in rejected.items()) or "none rejected"
    if not has_rounds:
        kept, generated = summary.get("warmup_kept"), summary.get("warmup_responses")
        reasons = "of the warm-up, which is all of this run"
    wall = (summary.get("wall_seconds_by_phase") or {}).get("total")
    drift = (summary.get("near_policy_kl") or {}).get("max")
    dtype = (summary.get("settings") or {}).get("dtype")
    how = f"in {dtype}; " if dtype else ""
    cards = [
        ("Held-out KL, nats a token", kl, f"{_figure(reduction, '.1%')} less than at the start"),
        ("Samples kept", f"{_figure(kept, ',')} of {_figure(generated, ',')}", reasons if kept is not None else ""),
        ("Optimizer steps", _figure(summary.get("optimizer_steps"), ","),
         f"{_figure(summary.get('trained_tokens'), ',')} response tokens"),
        ("Wall time", "–" if wall is None else duration(wall), f"{how}largest near-policy KL {_figure(drift, '.3f')}"),
    ]  # fmt: skip
    card = '<div class="card"><span>{}</span><strong>{}</strong><small>{}</small></div>'
    return '<div class="cards">' + "".join(card.format(*map(escape, texts)) for texts in cards) + "</div>\n"


def _round_table(summary: dict[str, Any]) -> str:
    """Kept and rejected, by round; only what occurred has a column."""
    rounds = summary.get("rollouts_by_round") or {}
    reasons = [reason for reason, n in (summary.get("rollouts_rejected") or {}).items() if n]
    trained = summary.get("trained_on") or {}
    has_given = any(trained.get(stage, {}).get("given") for stage in rounds)
    more = {"samples": "trained on", "given": "of these given"} if has_given else {}
    head = ["", "generated", "kept", *map(words, reasons), *more.values()]
    rows = [
        [
            stage_name(stage),
            *(entry["generated"], entry["kept"]),
            *((entry["rejected"] or {}).get(reason) for reason in reasons),
            *(trained.get(stage, {}).get(key) for key in more),
        ]
        for stage, entry in rounds.items()
    ]
    return _table(head, rows) if rows else ""


def _evaluation_table(evaluations: dict[str, Any]) -> str:
    """What every version scored, an evaluation a line."""
    versions = sorted({version for results in evaluations.values() for version in results}, key=_version_order)
    head = ["right answers", *(version if version == TEACHER else f"version {version}" for version in versions)]
    rows = [[name, *(_accuracy(results.get(version)) for version in versions)] for name, results in evaluations.items()]
    return _table(head, rows) if rows else ""


def _version_order(version: str) -> tuple[bool, int]:
    """The teacher last."""
    return (True, 0) if version == TEACHER else (False, int(version))


def _accuracy(result: dict[str, Any] | None) -> str | None:
    if result is None:
        return None
    low, high = (100 * end for end in result["wilson_95"])
    return f"{100 * result['accuracy']:.1f} % ({low:.1f} to {high:.1f})"


def _details(summary: dict[str, Any]) -> str:
    """Speed, settings and versions, folded away."""
    speed = [[f"{role}, tokens/s", rate] for role, rate in (summary.get("tokens_per_second_by_role") or {}).items()]
    keys = ("attention_backend", "packing_efficiency", "git_commit")
    for version, cost in (summary.get("publishing") or {}).items():
        seconds, stall = (_figure(cost[key], ".1f") for key in ("seconds", "stall_seconds"))
        speed.append([f"publishing version {version}", f"{seconds} s, of which training stood still {stall} s"])
    rows = speed + [[words(key), summary.get(key)] for key in keys]
    rows += [[words(key), value] for key, value in (summary.get("settings") or {}).items()]
    rows += [[name, version] for name, version in (summary.get("versions") or {}).items()]
    return f"<details><summary>Speed, settings and versions</summary>{_table([], rows)}</details>"


def _filled(title: str, body: str) -> str:
    return PAGE.replace("{title}", title).replace("{body}", body).replace("{next}", escape(READ_NEXT))


def _table(head: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(_figure(cell, ''))}</{tag}>" for cell in cells) + "</tr>"

    lines = ([line(head, "th")] if head else []) + [line(row, "td") for row in rows]
    return f'<div class="table"><table>{"".join(lines)}</table></div>\n'


def _figure(value: Any, form: str) -> str:
    """A number as text, a dash for one that is not known yet."""
    if value is None:
        return "–"
    return format(value, form or ("," if isinstance(value, int) else ".4g" if isinstance(value, float) else ""))


READ_HELDOUT = (
    "KL(teacher ‖ student) on the teacher's answers to prompts never trained on, for each published version: lower is "
    "better, 0 would be the teacher itself."
)
READ_EVALUATIONS = (
    "Share of right answers of each version, with the 95 % Wilson interval in which it would lie had other problems of "
    "the kind been asked; dashed: the teacher, once `npd evaluate RUN --teacher` has asked it."
)
READ_LOSS = (
    "loss = (1 − λ)·CE + λ·KD and its two parts; the shading is the stage trained on, and a jump where it changes is "
    "new data, not a fault."
)
READ_SCATTER = (
    "Each point is a sample, further up the harder for the teacher, further right the harder for the student: a green "
    "band (0 ≤ Δ ≤ τ) is what the Δ-IFD filter keeps, below it the student is unsure of its own words, above it the "
    "teacher finds them nearly impossible."
)
READ_HISTOGRAM = (
    "The same samples by Δ-IFD = IFD teacher − IFD student, coloured by what became of them: much mass just outside a "
    "line shows what moving τ, or a cooler sampling temperature, would let in."
)
READ_ROLES = (
    "One lane a role, a bar while it works, coloured by stage; above it what had come out by then: a gap in the "
    "trainer's lane is waiting, which more sidecars or an earlier rounds.publish_at shorten."
)
READ_DRIFT = (
    "KL(current student ‖ the snapshot that sampled the data), estimated at each step of the rounds: it should fall "
    "back at every refresh and stay below the dashed limit."
)
READ_NEXT = (
    "What to read next: whether it pays. examples/does_it_pay/ in the checkout runs the baselines (fine-tuning, "
    "offline and strictly on-policy distillation, other filters) with this system on a task that takes minutes; its "
    "RESULTS.md and docs/results.md have the figures, with intervals."
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f5f6f8; margin: 0 auto; max-width: 880px;
  padding: 1rem; }
h1 { font-size: 1.35rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 0; }
section, .card, .table, details { background: #fff; border: 1px solid #e3e7ec; border-radius: 8px; padding: 1rem; }
section, .table, details { margin-top: 1rem; } section p { color: #475467; margin: .3rem 0 .8rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(195px, 1fr)); gap: .75rem; }
.card span, .card small { color: #667085; display: block; font-size: .82rem; } .card strong { font-size: 1.2rem; }
.plot, .table { overflow-x: auto; } .plot img { display: block; width: 100%; min-width: 560px; }
footer { margin: 1.5rem 0; color: #475467; }
.absent { font-style: italic; } table { border-collapse: collapse; font-size: .88rem; } details .table { border: 0; }
td, th { padding: .25rem .8rem .25rem 0; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
th { color: #667085; font-weight: 600; }
details td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
</style></head><body><h1>{title}</h1>
{body}<footer>{next}</footer></body></html>
"""
