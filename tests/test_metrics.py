"""Metrics survive the death of their writer."""

from __future__ import annotations

from pathlib import Path

from megatron_npd.observe.metrics import Metrics, read_metrics


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
