"""Accuracies in summary, page, status and last words, of a run in any state."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_config import make_config

from megatron_npd.config import Config
from megatron_npd.files import write_json
from megatron_npd.report.conclusion import conclude
from megatron_npd.report.plots import plot_evaluations
from megatron_npd.report.status import status
from megatron_npd.report.status_text import as_text
from megatron_npd.report.summary import write_report
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION
from megatron_npd.tasks.intervals import wilson

pytestmark = pytest.mark.heavy  # draws


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Versions 0, 1 and 2; all answer `sums`."""
    return make_config(tmp_path / "run", evaluation=[{"task": "command", "name": "sums", "versions": "each"}])


@pytest.fixture
def run(config: Config) -> RunDirectory:
    """Two have answered, and the teacher."""
    run = RunDirectory(Path(config.run_directory))
    run.root.mkdir()
    run.config.write_text(config.to_toml())
    for version, correct in ((0, 10), (1, 90), (TEACHER_VERSION, 95)):
        answered(run, version, correct)
    return run


def answered(run: RunDirectory, version: int, correct: int) -> None:
    figures = {"correct": correct, "samples": 100, "problems": 100, "accuracy": correct / 100, "truncated": 0.25}
    write_json(run.result("sums", version), figures | {"wilson_95": wilson(correct, 100), "seconds": 1.0})
    if version >= 0:
        run.version(version).mkdir(parents=True)


def test_the_summary_has_every_version_and_the_teacher(run: RunDirectory, config: Config) -> None:
    summary = write_report(run, config)
    found = summary["evaluation"]["sums"]
    assert {version: entry["accuracy"] for version, entry in found.items()} == {"teacher": 0.95, "0": 0.1, "1": 0.9}
    assert found["1"]["wilson_95"] == [pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4)]
    assert summary["best_version"] == {"sums": 1} and summary["student_version"] is None
    page = run.report.read_text()
    assert "<th>right answers</th><th>version 0</th><th>version 1</th><th>teacher</th>" in page
    assert "<td>sums</td><td>10.0 % (5.5 to 17.4)</td><td>90.0 % (82.6 to 94.5)</td>" in page


def test_a_run_without_evaluations_says_nothing_of_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    summary = write_report(run, make_config(tmp_path))
    assert summary["evaluation"] is None and "right answers" not in run.report.read_text().replace(
        "right answers, %", ""
    )


def test_a_result_that_is_damaged_is_left_out(run: RunDirectory, config: Config) -> None:
    run.result("sums", 1).write_text("{")
    summary = write_report(run, config)
    assert list(summary["evaluation"]["sums"]) == ["teacher", "0"] and summary["best_version"] == {"sums": 0}


def test_every_version_is_drawn_with_its_interval(run: RunDirectory, config: Config) -> None:
    figure = plot_evaluations(write_report(run, config)["evaluation"])
    assert figure is not None
    (axes,) = figure.axes
    (bars,) = axes.containers
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert ends == [pytest.approx([5.52, 17.44], abs=0.01), pytest.approx([82.56, 94.48], abs=0.01)]
    assert plot_evaluations({}) is None


def test_status_tells_how_far_they_are_and_that_the_run_is_not_finished_before(run: RunDirectory) -> None:
    run.student.mkdir()
    text = as_text(status(run.root))
    assert "sums              answered by 2 of 3 versions; 90.0 % right by version 1" in text and ": stopped" in text
    answered(run, 2, 50)
    assert ": finished" in as_text(status(run.root))


def test_the_last_words_compare_the_first_version_with_the_last(run: RunDirectory, config: Config) -> None:
    answered(run, 2, 50)
    said: list[str] = []
    conclude(run, config, said.append)
    assert [line for line in said if line.startswith("sums")] == [
        "sums by version 0: 10/100 = 10.0 % (95 % Wilson 5.5 to 17.4)",
        "sums by version 2: 50/100 = 50.0 % (95 % Wilson 40.4 to 59.6)",
    ]
