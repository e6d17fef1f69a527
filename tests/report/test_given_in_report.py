"""Figures and pages of runs with given responses, and of runs without rounds: what the student sampled is apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fabricated_buffer import make_buffer
from inputs import Inputs

from megatron_npd.buffer.plan import plan_of
from megatron_npd.buffer.retention import retire_stages
from megatron_npd.config import Config
from megatron_npd.files import write_json
from megatron_npd.process.metrics import Metrics
from megatron_npd.report.conclusion import conclude
from megatron_npd.report.inspect import inspect
from megatron_npd.report.plots import plot_heldout, plot_roles
from megatron_npd.report.summary import collect_scores, summarise, write_report
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import Verdict

PROMPTS = 12
KEPT = 9
"""Of a unit of all prompts: a fabricated one rejects every fourth."""


def make_run(inputs: Inputs, **tables: dict[str, object]) -> tuple[RunDirectory, Config]:
    """A run on prompts that all have an answer, every stage annotated."""
    rows = [{"id": f"t{i}", "prompt": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(PROMPTS)]
    inputs.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, table in tables.items():
        inputs.set(name, table)
    return make_buffer(inputs, with_rollouts=True), inputs.config


@pytest.fixture
def mixed(inputs: Inputs) -> tuple[RunDirectory, Config]:
    """Two rounds, half given."""
    run, config = make_run(inputs, rounds={"count": 2, "given_share": 0.5}, warmup={"source": "data"})
    trainer = Metrics(run.metrics("trainer"), "trainer")
    trainer.log("stage", stage="warmup", samples=KEPT, given=KEPT, steps=2)
    for stage in ("round_0000", "round_0001"):
        trainer.log("stage", stage=stage, samples=2 * KEPT, given=KEPT, steps=4)
    return run, config


@pytest.fixture
def without_rounds(inputs: Inputs) -> tuple[RunDirectory, Config]:
    """Its warm-up on given responses is trained and evaluated."""
    run, config = make_run(inputs, rounds={"count": 0}, warmup={"source": "data"})
    Metrics(run.metrics("trainer"), "trainer").log("stage", stage="warmup", samples=KEPT, given=KEPT, steps=2)
    unit = {"stage": "warmup", "samples": PROMPTS, "given": True, "kept": KEPT, "tokens": 300, "seconds": 1.0}
    Metrics(run.metrics("annotator"), "annotator").log("unit", **unit)
    for version, kl in enumerate((4.0, 1.0)):
        write_json(run.evaluation(version), {"version": version, "heldout_kl": kl, "top1_agreement": 0.5})
    return run, config


def test_given_responses_are_not_counted_as_the_students(mixed: tuple[RunDirectory, Config]) -> None:
    summary = summarise(*mixed)
    assert (summary["rollouts_generated"], summary["rollouts_kept"]) == (2 * PROMPTS, 2 * KEPT)
    assert sum(summary["rollouts_rejected"].values()) == 2 * (PROMPTS - KEPT)
    assert (summary["warmup_responses"], summary["warmup_kept"]) == (PROMPTS, KEPT)
    assert summary["trained_on"]["round_0001"] == {"samples": 2 * KEPT, "given": KEPT}
    assert len(collect_scores(mixed[0])["verdict"]) == 2 * PROMPTS


def test_the_figures_outlive_the_shards(mixed: tuple[RunDirectory, Config]) -> None:
    run, config = mixed
    before = summarise(run, config)
    retire_stages(run, plan_of(run, config), ["warmup", "round_0000", "round_0001"], keep=1)
    assert not run.unit("samples", "round_0000", 1).exists() and not run.unit("samples", "warmup", 0).exists()
    after = summarise(run, config)
    assert {key: after[key] for key in before} == before


def test_the_page_says_how_many_were_given(mixed: tuple[RunDirectory, Config]) -> None:
    run, config = mixed
    write_report(run, config)
    page = run.report.read_text()
    assert "<th>trained on</th><th>of these given</th>" in page
    assert f"<td>{2 * KEPT}</td><td>{KEPT}</td></tr>" in page
    said: list[str] = []
    conclude(run, config, said.append)
    assert f"round_0001: trained on {2 * KEPT} samples, {KEPT} of them given" in said


def test_inspect_tells_given_ones_apart(mixed: tuple[RunDirectory, Config]) -> None:
    options = {"rejected": False, "kept": True, "reason": None, "limit": 0, "as_json": False}
    text = "\n".join(inspect(mixed[0].root, stage="round_0000", **options))
    assert text.count("policy v1 ") == text.count("sample 1  given ") == KEPT
    assert text.count("kept: as it was given") == KEPT and "the teacher's own" not in text


def test_a_run_without_rounds_speaks_of_its_warm_up(without_rounds: tuple[RunDirectory, Config]) -> None:
    run, config = without_rounds
    summary = write_report(run, config)
    assert summary["heldout_kl_reduction"] == {"whole_run": 0.75, "rounds": None}
    page = run.report.read_text()
    assert "<strong>4.000 → 1.000</strong>" in page and f"<strong>{KEPT} of {PROMPTS}</strong>" in page
    said: list[str] = []
    conclude(run, config, said.append)
    assert any(line.startswith(f"{PROMPTS} responses of the warm-up, {KEPT} kept") for line in said)
    assert not any("None responses" in line for line in said)


def test_its_plots_name_what_they_show(without_rounds: tuple[RunDirectory, Config]) -> None:
    summary = summarise(*without_rounds)
    heldout = plot_heldout(summary["heldout_kl_by_version"], summary["settings"])
    assert heldout is not None
    assert [label.get_text() for label in heldout.axes[0].get_xticklabels()] == ["v0\nbefore", "v1\nwarm-up"]
    unit = {"role": "annotator", "event": "unit", "time": 10.0, "seconds": 2.0, "stage": "warmup", "kept": KEPT}
    roles = plot_roles([unit | {"samples": PROMPTS, "given": True}], [])
    assert roles is not None and roles.axes[0].get_ylabel() == "samples of\nthe warm-up"
    assert any(np.array_equal(line.get_ydata(), [KEPT]) for line in roles.axes[0].lines)


def test_old_figures_of_collected_stages_are_still_read(mixed: tuple[RunDirectory, Config]) -> None:
    """Written before responses could be given."""
    run, config = mixed
    verdicts = {verdict.name.lower(): 0 for verdict in Verdict} | {"kept": 7, "degenerate": 2}
    for kind in ("rollouts", "samples"):
        folder = run.stage(kind, "round_0000")
        for shard in folder.glob("unit_*"):
            shard.unlink()
        write_json(folder / "collected.json", {"stage": "round_0000", "units": 1, "samples": 9, "verdicts": verdicts})
    assert summarise(run, config)["rollouts_by_round"]["round_0000"]["generated"] == 9
    assert summarise(run, config)["rollouts_by_round"]["round_0000"]["kept"] == 7
