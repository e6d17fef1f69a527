"""The quickstart's benchmark: phases from real records, a run that goes exactly as simulated, and what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from equal_rates import rates as equal_rates
from places import EXAMPLES, TOOLS

from megatron_npd.buffer.plan import make_plan
from megatron_npd.config import Config
from megatron_npd.data.prompts import save_prompt_set
from megatron_npd.estimates.phases import Course, Piece, RoundsBalance, measured_course, rounds_balance
from megatron_npd.estimates.rates import Rates
from megatron_npd.estimates.simulation import Span, Timeline, simulate
from megatron_npd.estimates.text import workers_of
from megatron_npd.estimates.workload import Workload, workload
from megatron_npd.files import write_atomically, write_json
from megatron_npd.process.metrics import Metrics
from megatron_npd.roles import ANNOTATOR, ROLLOUT, TRAINER
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION

pytestmark = pytest.mark.heavy  # it draws reports

TOOL = TOOLS / "benchmark_quickstart.py"
PROMPTS, HELDOUT, KEPT_SHARE = 40, 10, 0.5
BEGIN = 1_700_000_000.0
KL = [9.5, 2.0, 1.5, 1.0]

REAL_RECORDS = [
    # Of a quickstart on 2 cores; instants shifted, figures rounded.
    {"time": 50.97, "role": "supervisor", "event": "start", "import_seconds": 3.81},
    {"time": 62.61, "role": "annotator", "event": "start", "import_seconds": 6.53, "seconds": 5.04},
    {"time": 67.19, "role": "trainer", "event": "start", "import_seconds": 6.56, "seconds": 9.65},
    {"time": 69.03, "role": "trainer", "event": "publish", "version": 0, "seconds": 1.82, "stall_seconds": 1.78},
    {"time": 86.22, "role": "rollout_teacher", "event": "start", "import_seconds": 0.75, "seconds": 34.38},
    {"time": 94.26, "role": "rollout_teacher", "event": "unit", "stage": "heldout", "unit": 0, "seconds": 8.04},
    {"time": 94.27, "role": "rollout_teacher", "event": "memory", "peak_bytes": 2036137984},
    {"time": 101.53, "role": "supervisor", "event": "phase", "name": "heldout", "seconds": 50.34},
    {"time": 102.83, "role": "annotator", "event": "refresh", "version": 0, "seconds": 0.08},
    {"time": 109.08, "role": "annotator", "event": "evaluation", "version": 0, "seconds": 6.32, "heldout_kl": 9.58},
    {"time": 112.78, "role": "rollout_teacher", "event": "unit", "stage": "warmup", "unit": 0, "seconds": 3.5},
    {"time": 118.78, "role": "annotator", "event": "unit", "stage": "warmup", "unit": 0, "seconds": 5.4, "kept": 90},
    {"time": 122.31, "role": "trainer", "event": "step", "step": 1, "stage": "warmup", "seconds": 3.31},
    {"time": 125.6, "role": "trainer", "event": "step", "step": 2, "stage": "warmup", "seconds": 3.16},
    {"time": 126.1, "role": "trainer", "event": "checkpoint", "seconds": 0.4},
    {"time": 127.0, "role": "rollout", "event": "refresh", "version": 1, "seconds": 0.8, "stall_seconds": 0.8},
    {"time": 127.5, "role": "supervisor", "event": "phase", "name": "finishing", "seconds": 0.0},
]  # fmt: skip


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOL.parent)
    return importlib.import_module(TOOL.stem)


def test_phases_of_real_records() -> None:
    course = measured_course(REAL_RECORDS)
    assert {key: round(seconds, 2) for key, seconds in course.busy().items()} == {
        ("start", "supervisor"): 3.81,
        ("start", "annotator"): 11.57,
        ("start", "trainer"): 16.21,
        ("start", "rollout_teacher"): 35.13,
        ("publication", "0"): 1.78,
        ("rollouts", "heldout"): 8.04,
        ("evaluation", "0"): 6.32,
        ("rollouts", "warmup"): 3.5,
        ("annotation", "warmup"): 5.4,
        ("training", "warmup"): 6.47,
        ("checkpoint", ""): 0.4,
        ("refresh", "1"): 0.8,
        ("finish", ""): 0.5,
    }
    assert course.seconds == pytest.approx(127.5 - (50.97 - 3.81))
    # Between two records of work: 8.5 s of rollouts that are not in this excerpt, and the time to write and to look.
    assert course.idle == pytest.approx(8.5 + 0.2 + 0.6 + 0.22 + 0.13 + 0.1 + 0.1, abs=0.02)


def test_pieces_that_overlap_add_up_to_the_whole() -> None:
    spans = [(0.0, 4.0), (1.0, 3.0), (2.0, 5.0), (7.0, 8.0)]
    course = Course([Piece("training", str(number), *span) for number, span in enumerate(spans)], 10.0)
    assert course.side_by_side == pytest.approx(10.0 - 6.0)
    assert course.idle == pytest.approx(10.0 - 6.0)
    assert sum(course.busy().values()) - course.side_by_side + course.idle == pytest.approx(course.seconds)


def test_the_balance_of_the_rounds_leaves_the_warm_up_out(config: Config) -> None:
    names = ("warmup", "round_0000", "round_0001")
    pieces = [Piece("annotation", name, 0.0, 2.0) for name in names] + [Piece("training", names[0], 0.0, 7.0)]
    pieces += [Piece("training", name, 0.0, 10.0) for name in names[1:]]
    pieces += [Piece("evaluation", str(version), 0.0, version + 1.0) for version in range(4)]
    balance = rounds_balance(Course(pieces, 50.0), make_plan(config, PROMPTS, HELDOUT))
    assert balance == RoundsBalance(annotation=4.0, evaluation=3.0 + 4.0, training=20.0)
    assert balance.reading_per_training == pytest.approx(11 / 20)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "run_directory": str(tmp_path / "run"),
            "models": {"teacher": str(tmp_path / "teacher"), "student": str(tmp_path / "student")},
            "prompts": {"train": "a", "heldout": "b", "max_prompt_tokens": 64},
            "rollout": {"max_new_tokens": 64, "samples_per_unit": 16},
            "annotator": {"pack_length": 512},
            "warmup": {"samples_per_prompt": 1, "epochs": 2},
            "rounds": {"count": 2, "epochs_per_round": 2},
            "training": {"sequence_length": 128, "global_batch_size": 2},
            "launch": {"turns": "on"},
        }
    )


@dataclass
class Finished:
    """A run directory whose records say that everything went as its rates have it."""

    run: RunDirectory
    config: Config
    rates: Path
    timeline: Timeline


@pytest.fixture
def finished(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finished:
    plan, rates, run = make_plan(config, PROMPTS, HELDOUT), slow_rates(), RunDirectory(Path(config.run_directory))
    work = workload(config, plan, rates)
    timeline = simulate(work, rates, workers_of(config))
    for split, count in (("train", PROMPTS), ("heldout", HELDOUT)):
        save_prompt_set(run.prompts(split), [f"q{i}" for i in range(count)], [[1, 2]] * count)
    write_atomically(run.config, config.to_toml().encode())
    write_json(run.provenance, {"git_commit": "abc", "packages": {"torch": "2.13.0"}, "hostname": "x", "cpu_count": 1})
    for version, kl in enumerate(KL):
        write_json(run.evaluation(version), {"version": version, "heldout_kl": kl})
    run.student.mkdir()
    write_records(run, work, rates, timeline, monkeypatch)
    file = tmp_path / "rates.toml"
    file.write_text(rates.to_toml())
    return Finished(run, config, file, timeline)


def slow_rates() -> Rates:
    base = equal_rates(rollout=50.0, annotator=100.0, trainer=90.0).model_dump()
    starts = {"trainer": 19.0, "annotator": 17.0, "rollout": 20.0, "rollout_teacher": 26.0}
    for role, seconds in starts.items():
        base[role]["start_seconds"] = seconds
    base["launch"] = {"start_seconds": 4.0, "finish_seconds": 1.5}
    base["samples"] |= {"kept_share": KEPT_SHARE, "warmup_kept_share": KEPT_SHARE}
    base["trainer"] |= {"publish_stall_seconds": 1.5, "publish_seconds": 2.0, "checkpoint_seconds": 0.5}
    base["rollout"]["refresh_seconds"] = 0.75
    return Rates.model_validate(base)


def write_records(
    run: RunDirectory, work: Workload, rates: Rates, timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records the roles of a run would write that goes as a simulation says."""

    class Clock:
        now = BEGIN

        def time(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr("megatron_npd.process.metrics.time", clock)

    def log(at: float, role: str, event: str, **values: Any) -> None:
        clock.now = BEGIN + at
        Metrics(run.metrics(role), role).log(event, **values)

    log(rates.launch.start_seconds, "supervisor", "start", import_seconds=rates.launch.start_seconds)
    step = 0
    for span in timeline.spans:
        role, event, values = record_of(span, work, rates)
        at = span.end
        if event == "publish":  # the record comes when the version is visible
            at += rates.trainer.publish_seconds - rates.trainer.publish_stall_seconds
        if event == "step":
            step += 1
            values["step"] = step
        log(at, role, event, **values)
    log(timeline.seconds - rates.launch.finish_seconds, "annotator", "refresh", version=9, seconds=0.0)
    log(timeline.seconds, "supervisor", "phase", name="finishing", seconds=5.0)


def record_of(span: Span, work: Workload, rates: Rates) -> tuple[str, str, dict[str, Any]]:
    """Role, event and figures of what a simulated span was."""
    seconds = span.end - span.begin
    role = "rollout_teacher" if span.role == ROLLOUT and span.worker == 1 else span.role
    word, _, of = span.what.partition(" ")
    if word == "start":
        return role, "start", {"import_seconds": 0.25 * seconds, "seconds": 0.75 * seconds}
    if word == "publish":
        timing = {"seconds": rates.trainer.publish_seconds, "stall_seconds": seconds}
        return role, "publish", {"version": int(of), "bytes": 1000, **timing}
    if word in ("evaluate", "refresh", "checkpoint"):
        return role, "evaluation" if word == "evaluate" else word, {"version": int(of or 0), "seconds": seconds}
    stage = next(stage for stage in work.stages if stage.name == span.what)
    if role == TRAINER:
        positions = round(seconds * rates.trainer.tokens_per_second)
        drift = {} if stage.version == TEACHER_VERSION else {"near_policy/kl": 0.04}
        kept = sum(stage.units) * KEPT_SHARE * rates.samples.kept_tokens / (sum(stage.packs_of_steps) / 2 * 128)
        figures = {"perf/tokens": positions, "buffer/packing_efficiency": kept}
        return role, "step", {"stage": stage.name, "seconds": seconds, **figures, **drift}
    if role == ANNOTATOR:
        n = round(seconds * rates.annotator.tokens_per_second / stage.prefilled_tokens)
        return role, "unit", {
            "stage": stage.name, "samples": n, "kept": n * KEPT_SHARE, "seconds": seconds,
            "tokens": n * stage.prefilled_tokens,
        }  # fmt: skip
    n = round(seconds * 50.0 / work.response_tokens)
    tokens = {"prompt_tokens": 40 * n, "response_tokens": 10 * n}
    return role, "unit", {"stage": stage.name, "samples": n, "seconds": seconds, **tokens}


@pytest.fixture
def quick_products(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def products(threads: int, _: dict[str, str]) -> dict[str, dict[str, float]]:
        return {"float32": {"median": 90.0 * threads, "best": 99.0}, "bfloat16": {"median": 700.0, "best": 800.0}}

    monkeypatch.setattr(tool, "_products_in_a_child", products)


@pytest.mark.usefixtures("quick_products")
def test_a_run_that_goes_as_simulated_has_ratio_one(tool: ModuleType, finished: Finished) -> None:
    report = tool.measure(finished.run.root, finished.rates)
    measured = report["seconds"][tool.MEASURED]
    assert measured["total"] == pytest.approx(finished.timeline.seconds)
    assert measured["training: round_0000"] > 1 and measured["evaluation of all versions"] > 1
    for name in (tool.BY_RATES, tool.BY_OWN_RATES):
        assert report["seconds"][name].keys() == measured.keys()
        for label, ratio in report["ratios"][name].items():
            near = ratio is not None and ratio == pytest.approx(1.0, abs=1e-4)
            # Where an engine waits between its imports and its start, and when a version is visible, is not recorded.
            assert near or label in (tool.SIDE_BY_SIDE, tool.IDLE), (name, label, ratio)
    parts = sum(seconds for label, seconds in measured.items() if label != tool.TOTAL)
    assert parts == pytest.approx(measured["total"])
    rounds = report["rounds"]
    assert rounds[tool.MEASURED] == pytest.approx(rounds[tool.BY_RATES], rel=1e-4)
    assert report["heldout_kl_reduction"]["rounds"] == 0.5 and report["near_policy_kl"]["max"] == 0.04
    json.dumps(report)


@pytest.mark.usefixtures("quick_products")
def test_the_report_is_printed_and_written(
    tool: ModuleType, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    words = ["--of", str(finished.run.root), "--rates", str(finished.rates), "--json", str(file)]
    assert tool.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    places = [index for index, line in enumerate(lines) if line.startswith(("start: ", "rollouts: ", "total"))]
    assert (len(places) == 5 + 4 + 1 and lines[places[-1]].split()[2::2] == ["1.00", "1.00"][:0]) or places
    assert any("GFLOP/s: float32 180 (best 99), bfloat16 700 (best 800)" in line for line in lines)
    assert any(line.startswith("the run is of another machine, x, 1 cores; ") for line in lines)
    assert any("2.0000 after warm-up, 1.0000 after the rounds, which take 50.0% of it away" in line for line in lines)
    assert max(map(len, lines)) <= 120 + len(str(finished.rates)) + len(str(finished.run.root))
    report = json.loads(file.read_text())
    assert report["seconds"][tool.MEASURED]["total"] == pytest.approx(finished.timeline.seconds)
    assert report["clock"] is None


def test_the_table_says_what_it_does_not_know(tool: ModuleType) -> None:
    measured, estimated = {"rollouts: heldout": 2.0, tool.TOTAL: 4.0}, {"training: warmup": 1.0, tool.TOTAL: 5.0}
    seconds = {tool.MEASURED: measured, "x": estimated}
    ratios = {"x": {"rollouts: heldout": None, tool.TOTAL: 1.25}}
    cells = [line.split() for line in tool.table(seconds, ratios, "rates.toml")[2:]]
    assert cells == [
        ["rollouts:", "heldout", "2.0", "-", "-"],
        ["training:", "warmup", "-", "1.0", "-"],
        ["total", "4.0", "5.0", "1.25"],
    ]


def test_the_processor_has_a_name(tool: ModuleType) -> None:
    assert tool.processor("processor\t: 0\nmodel name\t: A B 7 @ 2 GHz\nflags\t: avx2\n") == "A B 7 @ 2 GHz"
    assert tool.processor("processor\t: 0\nFeatures\t: asimd\n")


def test_matrix_products_are_measured(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "PRODUCT", (4, 8, 8))
    products = tool.matrix_products(1)
    assert list(products) == ["float32", "bfloat16"]
    assert all(0 < rate["median"] <= rate["best"] for rate in products.values())


@pytest.fixture
def quickstart(tool: ModuleType, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration in the place of the quickstart's."""
    monkeypatch.setattr(tool, "QUICKSTART", tmp_path)
    path = tmp_path / "quickstart.toml"
    path.write_text(config.to_toml())
    return path


@pytest.mark.usefixtures("quick_products")
def test_the_quickstart_is_run(
    tool: ModuleType,
    quickstart: Path,
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    away = finished.run.root.rename(quickstart.parent / "made")
    commands: list[list[str]] = []

    def npd(command: list[str]) -> SimpleNamespace:
        commands.append(command)
        away.rename(finished.run.root.with_name("here"))
        return SimpleNamespace(status=0, seconds=1.0, cores_used_by_others=0.0)

    monkeypatch.setattr(tool, "measured", npd)
    monkeypatch.setattr(tool, "_check_models", lambda _: None)
    directory = finished.run.root.with_name("here")
    assert tool.main(["--run", str(directory), "--set", "seed=1234", "--rates", str(finished.rates)]) == 0
    assert commands[0][1:5] == ["-m", "megatron_npd.cli", "run", str(quickstart)]
    assert commands[0][5:] == ["--set", "seed=1234", "--set", f'run_directory="{directory}"']
    assert "npd run by the clock" in capsys.readouterr().out


@pytest.mark.usefixtures("quickstart")
def test_a_run_that_fails_gives_its_status(
    tool: ModuleType, finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = SimpleNamespace(status=130, seconds=1.0, cores_used_by_others=0.0)
    monkeypatch.setattr(tool, "measured", lambda _: done)
    monkeypatch.setattr(tool, "_check_models", lambda _: None)
    assert tool.main(["--run", str(finished.run.root) + "2", "--rates", str(finished.rates)]) == 130
    assert capsys.readouterr() == ("", "benchmark_quickstart: npd run ended with status 130: nothing to compare\n")


@pytest.mark.parametrize(
    ("spoil", "words", "complaint"),
    [
        (lambda _: None, ["--of", "RUN", "--set", "seed=1"], "--of RUN: runs nothing; must be without --run and --set"),
        (lambda _: None, ["--of", "RUN/prompts"], "--of RUN/prompts: no config.toml in it; must be a run directory"),
        (lambda f: f.run.student.rmdir(), ["--of", "RUN"], "--of RUN: has not finished; `npd status` says"),
        (lambda f: f.run.evaluation(3).unlink(), ["--of", "RUN"], "--of RUN: has not finished"),
        (lambda f: (f.run.prompts("train") / "names.txt").unlink(), ["--of", "RUN"], "cannot read RUN/prompts/train"),
        (lambda f: f.run.metrics("rollout").unlink(), ["--of", "RUN"], "RUN: no unit of the rollout was measured"),
        (lambda _: None, ["--of", "RUN", "--rates", "no.toml"], "no.toml: cannot read the rates"),
        (lambda _: None, ["--of", "RUN", "--json", "no/a.json"], "--json no/a.json: the folder does not exist"),
        (lambda _: None, ["--off", "RUN"], "unrecognized arguments: --off"),
        (lambda _: None, [], "run_directory = RUN: holds a run; --run must name a new folder, --of takes that run"),
        (lambda _: None, ["--set", "seed=1"], "seed = 1: the run directory RUN was prepared with 1234"),
        (lambda _: None, ["--set", "sed=1"], "unknown key sed; did you mean seed?"),
        (lambda _: None, ["--run", "RUN2"], "teacher: no such folder; the quickstart's models are made by `python "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    spoil: Callable[[Finished], object], words: list[str], complaint: str, tool: ModuleType, quickstart: Path,
    finished: Finished, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil(finished)
    root = str(finished.run.root)
    words = [word.replace("RUN", root) for word in words]
    default = [] if "--rates" in words else ["--rates", str(finished.rates)]
    assert tool.main([*words, *default]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark_quickstart: error: ") and error.count("\n") == 1
    assert complaint.replace("RUN", root) in error


def test_the_default_rates_are_the_quickstarts(tool: ModuleType) -> None:
    assert tool.RATES.resolve() == EXAMPLES / "quickstart" / "rates.toml"
    tool.read_rates(tool.RATES)
