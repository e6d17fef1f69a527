"""From the results to a Markdown table and one self-contained page.

    python page.py [--results FOLDER] [--markdown FILE] [--html FILE]

Accuracies are means over prompt sets with 95 % t-intervals; differences are paired by prompt set. A cost is the seconds
that roles worked, one thread each: sampling with what it takes to hand weights over, scoring, training. Starting
processes and measuring accuracy are left out.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arms
from arms import Arm, Setting
from matplotlib.figure import Figure
from statistics_of import Mean, mean_of, paired, wilson

HERE = Path(__file__).resolve().parent
Results = dict[tuple[str, str], dict[int, dict[str, Any]]]
"""(setting, arm) → prompt set → result."""
WARM = arms.WARM.name
PAPER = [
    ("training on the student's own answers", "refresh_0", "kd", "+2.84"),
    ("the same, against fine-tuning", "refresh_0", "sft", "+2.84"),
    ("refreshing them", "refresh_1", "refresh_0", "+1.59"),
    ("Δ-IFD", "filter", "refresh_3", "+1.15"),
]
"""The paper's three ablations (points of its average of 11 benchmarks, openPangu 7B → 1B), and ours. What the first is
measured against is not known for certain: the three add up to 5.58 of the 8.09 points above fine-tuning, so that
distillation without the student's answers is likelier."""
CONTROLS = [
    ("near-policy against fine-tuning", "refresh_3", "sft"),
    ("ten refreshes against fine-tuning", "refresh_10", "sft"),
    ("soft labels alone: offline distillation against fine-tuning", "kd", "sft"),
    ("own answers against as many different ones of the teacher's", "refresh_3", "varied"),
    ("own answers against as many corrupted ones", "refresh_3", "corrupted"),
    ("different answers of the teacher's against one", "varied", "kd"),
    ("corrupted answers against one", "corrupted", "kd"),
    ("Δ-IFD against a random drop of the same size", "filter", "random"),
    ("a random drop against none", "random", "refresh_3"),
    ("ten refreshes against strictly on-policy", "refresh_10", "strict"),
]


def read(folder: Path) -> Results:
    """Every result below a folder."""
    results: Results = defaultdict(dict)
    for path in sorted(folder.glob("*/*/set_*.json")):
        one = json.loads(path.read_text())
        results[one["setting"], one["arm"]][one["prompt_set"]] = one
    return results


def accuracy(one: dict[str, Any]) -> float:
    """Percent."""
    return 100.0 * one["correct"] / one["problems"]


def accuracies(results: Results, setting: str, arm: str) -> dict[int, float]:
    return {number: accuracy(one) for number, one in results.get((setting, arm), {}).items()}


def cost(one: dict[str, Any]) -> float:
    """Device-seconds of all roles."""
    return sum(one["device_seconds"].values())


def average(runs: dict[int, dict[str, Any]], key: str, role: str | None = None) -> float:
    values = [one[key][role] if role else one[key] for one in runs.values()]
    return sum(values) / len(values)


def difference(results: Results, setting: str, ours: str, theirs: str) -> Mean | None:
    return paired(accuracies(results, setting, ours), accuracies(results, setting, theirs))


def in_words(runs: dict[int, dict[str, Any]]) -> str:
    """Accuracy: its mean and t-interval over prompt sets; of one run alone, its Wilson interval."""
    if len(runs) > 1:
        return str(mean_of([*map(accuracy, runs.values())]))
    (one,) = runs.values()
    low, high = wilson(one["correct"], one["problems"])
    return f"{accuracy(one):.1f} ({low:.1f} to {high:.1f})"


def runs_of(results: Results, setting: Setting, arm: Arm) -> dict[int, dict[str, Any]]:
    """An arm's results by prompt set; the warmed-up students are those the setting starts from."""
    name = setting.warmed_as if arm is arms.WARM and setting.warmed_as else setting.name
    return {number: one for number, one in results.get((name, arm.name), {}).items() if number in setting.sets}


def settings() -> list[tuple[Setting, list[Arm]]]:
    return [(setting, [arms.WARM, *its_arms]) for setting, its_arms in arms.PLAN]


def arm_table(results: Results, setting: Setting, its_arms: list[Arm]) -> list[list[str]]:
    """One row an arm that has results."""
    rows = [["arm", "sets", "accuracy %", "held-out KL", "rollout s", "annotation s", "training s", "device-s",
             "generated tokens", "trained tokens"]]  # fmt: skip
    for arm in its_arms:
        if runs := runs_of(results, setting, arm):
            seconds = [average(runs, "device_seconds", role) for role in ("rollout", "annotator", "trainer")]
            rows.append([
                f"{arm.name}: {arm.says}", str(len(runs)), in_words(runs),
                f"{average(runs, 'heldout_kl'):.3f}", *(f"{second:.1f}" for second in seconds), f"{sum(seconds):.1f}",
                f"{average(runs, 'generated_tokens') / 1e3:.0f} k", f"{average(runs, 'trained_tokens') / 1e3:.0f} k",
            ])  # fmt: skip
    return rows


def ablation_table(results: Results) -> list[list[str]]:
    """The paper's ablations beside ours."""
    rows = [["ablation", "paper, points", "here, points (paired)", "sets", "agreement"]]
    for says, ours, theirs, paper in PAPER:
        if found := difference(results, "certain", ours, theirs):
            rows.append([f"{says} ({ours} − {theirs})", paper, found.signed(), str(found.count), verdict(found)])
    return rows


def verdict(found: Mean) -> str:
    """Whether a difference has the paper's sign, which is positive in all three."""
    if found.low > 0:
        return "same sign"
    return "opposite sign" if found.high < 0 else "not seen: the interval holds 0"


def control_table(results: Results) -> list[list[str]]:
    rows = [["comparison", "points (paired)", "sets"]]
    for says, ours, theirs in CONTROLS:
        if found := difference(results, "certain", ours, theirs):
            rows.append([f"{says} ({ours} − {theirs})", found.signed(), str(found.count)])
    for ours, theirs in (("kd", "sft"), ("refresh_3", "sft"), ("refresh_3", "kd")):
        if found := difference(results, "uncertain", ours, theirs):
            rows.append([f"with a teacher that is not certain: {ours} − {theirs}", found.signed(), str(found.count)])
    return rows


def filter_table(results: Results) -> list[list[str]]:
    """What the filter did under each condition."""
    rows = [["condition", "kept", "Δ-IFD − none", "Δ-IFD − random drop", "sets"]]
    for setting, _ in settings():
        against_none = difference(results, setting.name, "filter", "refresh_3")
        against_random = difference(results, setting.name, "filter", "random")
        if against_none and against_random:
            runs = results[setting.name, "filter"].values()
            shares = [sum(one["kept_share"]) / len(one["kept_share"]) for one in runs]
            rows.append([
                setting.says, f"{100 * sum(shares) / len(shares):.0f} %", against_none.signed(),
                against_random.signed(), str(against_none.count),
            ])  # fmt: skip
    return rows


def filter_paragraph(results: Results) -> str:
    """In which of the conditions the filter was seen to help; nothing is said that the intervals do not."""
    found = {
        setting.says: (difference(results, setting.name, "filter", "refresh_3"),
                       difference(results, setting.name, "filter", "random"))
        for setting, _ in settings()
    }  # fmt: skip
    tried = {says: pair for says, pair in found.items() if all(pair)}
    if not tried:
        return "No condition was run with and without the filter yet."
    helped = [says for says, (none, random) in tried.items() if none.low > 0 and random.low > 0]
    harmed = [says for says, (none, _) in tried.items() if none.high < 0]
    parts = [f"The filter was tried under {len(tried)} conditions."]
    parts.append(
        f"It was seen to help (above no filter and above a random drop, both intervals without 0) with "
        f"{'; '.join(helped)}." if helped else "In none of them was it seen to help: nowhere do both intervals, "
        "against no filter and against a random drop of the same size, exclude 0."
    )  # fmt: skip
    if harmed:
        parts.append(f"It was seen to cost accuracy with {'; '.join(harmed)}.")
    return " ".join(parts)


def headline(results: Results) -> list[str]:
    """The two claims the example is there for, as measured."""
    lines = []
    for arm in ("refresh_1", "refresh_3", "refresh_10"):
        if found := difference(results, "certain", arm, "sft"):
            lines.append(
                f"{arm} is {found.signed()} points from supervised fine-tuning, over {found.count} prompt sets."
            )
    strict = results.get(("certain", "strict"), {})
    for arm in ("refresh_3", "refresh_10", "refresh_21"):
        runs = results.get(("certain", arm), {})
        both = sorted(strict.keys() & runs.keys())
        if both:
            share = sum(accuracy(runs[n]) for n in both) / sum(accuracy(strict[n]) for n in both)
            spent = sum(cost(runs[n]) for n in both) / sum(cost(strict[n]) for n in both)
            lines.append(
                f"On the {len(both)} sets with a strictly on-policy run, {arm} reaches {100 * share:.1f} % of its "
                f"accuracy with {100 * spent:.1f} % of its device-seconds."
            )
    return lines


def frontier(results: Results) -> Figure:
    """Accuracy against cost of the first setting's arms, and which no other beats in both. An arm that was run on fewer
    prompt sets than the others says so: its mean is over other sets than theirs."""
    setting, its_arms = arms.PLAN[0]
    points = {}
    for arm in its_arms:
        if runs := runs_of(results, setting, arm):
            costs = [cost(one) for one in runs.values()]
            points[arm.name] = sum(costs) / len(costs), mean_of([*map(accuracy, runs.values())])
    figure = Figure(figsize=(8, 4.6))
    axes = figure.subplots()
    for name, (seconds, mean) in points.items():
        error = mean.half_width if math.isfinite(mean.half_width) else 0.0
        axes.errorbar(seconds, mean.value, yerr=error, fmt="o", capsize=3)
        label = name if mean.count == len(setting.sets) else f"{name} ({mean.count} sets)"
        axes.annotate(label, (seconds, mean.value), (6, 4), textcoords="offset points", fontsize=9)
    best = on_frontier({name: (seconds, mean.value) for name, (seconds, mean) in points.items()})
    axes.plot(*zip(*((points[name][0], points[name][1].value) for name in best), strict=True) if best else ((), ()),
              color="#98a2b3", linewidth=1, zorder=0)  # fmt: skip
    axes.set(xscale="log", xlabel="device-seconds of one run", ylabel="accuracy, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def on_frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points (cost, accuracy) than which no cheaper one is as good, by cost."""
    best, names = -math.inf, []
    for name, (_, value) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if value > best:
            best = value
            names.append(name)
    return names


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sections(results: Results) -> list[tuple[str, str, list[list[str]]]]:
    """(title, text, table) of everything there is."""
    found = [("In short", " ".join(headline(results)) or "Nothing was run yet.", [])]
    found += [
        (f"Setting “{setting.name}”: {setting.says}", "", arm_table(results, setting, its_arms))
        for setting, its_arms in settings()
    ]
    found += [
        ("The paper's ablations", "Another task, other models, another scale: signs can agree, sizes cannot.",
         ablation_table(results)),
        ("Comparisons and controls", "", control_table(results)),
        ("The filter", filter_paragraph(results), filter_table(results)),
    ]  # fmt: skip
    return [(title, text, table) for title, text, table in found if text or len(table) > 1]


def markdown(results: Results) -> str:
    machines = sorted({one["machine"] for runs in results.values() for one in runs.values()})
    dates = sorted({one["date"] for runs in results.values() for one in runs.values()})
    made = "Made by `python examples/does_it_pay/page.py`; ± are 95 % intervals over prompt sets."
    when = f"Runs of {dates[0]} to {dates[-1]} on: {'; '.join(machines)}." if dates else ""
    parts = ["# Does it pay? Results", "", made, when]
    for title, text, table in sections(results):
        parts += ["", f"## {title}", ""] + ([text, ""] if text else [])
        parts += [markdown_table(table)] if len(table) > 1 else []
    return "\n".join(parts).rstrip() + "\n"


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Does it pay?</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f5f6f8; margin: 0 auto; max-width: 1000px;
  padding: 1rem; }}
section {{ background: #fff; border: 1px solid #e3e7ec; border-radius: 8px; padding: 1rem; margin-top: 1rem;
  overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
td, th {{ padding: .25rem .8rem .25rem 0; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} th {{ color: #667085; }} svg {{ max-width: 100%; height: auto; }}
</style></head><body><h1>Does it pay?</h1>{body}</body></html>
"""


def page(results: Results) -> str:
    """Everything on one page that needs nothing else."""
    image = io.StringIO()
    frontier(results).savefig(image, format="svg", metadata={"Date": None})
    svg = image.getvalue()
    plot = f"<h2>Accuracy against cost</h2>{svg[svg.index('<svg') :]}"
    parts = [f"<section>{plot}</section>"]
    for title, text, table in sections(results):
        parts.append(f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{_table(table)}</section>")
    return PAGE.format(body="\n".join(parts))


def _table(rows: list[list[str]]) -> str:
    if len(rows) < 2:
        return ""
    head, *body = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                   for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False))  # fmt: skip
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--markdown", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--html", type=Path, default=Path("runs/does_it_pay/page.html"))
    arguments = parser.parse_args()
    results = read(arguments.results)
    arguments.markdown.write_text(markdown(results))
    arguments.html.parent.mkdir(parents=True, exist_ok=True)
    arguments.html.write_text(page(results))
    print("\n".join(headline(results)))
    print(f"table: {arguments.markdown}\npage:  {arguments.html}")


if __name__ == "__main__":
    main()
