"""Metrics survive the death of their writer."""

from __future__ import annotations

from pathlib import Path

from megatron_npd.process.metrics import Metrics, busy_span, read_metrics


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "trainer.jsonl"
    Metrics(path, "trainer").log("step", 1, **{"train/loss": 2.0})
    with open(path, "a") as file:
        file.write('{"time": 1, "role": "tra')  # killed in the middle of a write
    Metrics(path, "trainer").log("step", 2, **{"train/loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_records_of_all_roles_come_by_time(tmp_path: Path) -> None:
    for role in ("trainer", "annotator", "trainer"):
        Metrics(tmp_path / f"{role}.jsonl", role).log("start", seconds=1.0)
    (tmp_path / "other.jsonl").write_text('[1, 2]\n{"no": "time"}\n')
    records = read_metrics(tmp_path)
    assert [record["role"] for record in records] == ["trainer", "annotator", "trainer"]


def test_a_role_is_busy_only_while_it_does_nothing_else() -> None:
    step = {"time": 100.0, "event": "step", "seconds": 4.0}
    assert busy_span(step) == (96.0, 100.0)
    assert busy_span({"time": 100.0, "perf/seconds": 4.0}) == (96.0, 100.0)
    publish = {"time": 100.0, "event": "publish", "seconds": 10.0, "stall_seconds": 0.5}
    assert busy_span(publish) == (90.0, 90.5), "the rest was written beside training"
    assert busy_span(publish | {"stall_seconds": 0.0}) == (90.0, 90.0)
    for silent in ({}, {"seconds": 0.0}, {"seconds": float("nan")}, {"seconds": None}):
        assert busy_span({"time": 100.0} | silent) is None
