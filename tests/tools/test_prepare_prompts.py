"""tools/prepare_prompts.py: from any data set to the two files that a run takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from inputs import Inputs
from places import TOOLS
from pyarrow.parquet import write_table

from megatron_npd.prepare.preflight import preflight

QUESTIONS = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(20)]
MAPPED = ("--set", "prompts.columns.prompt=question", "--set", "prompts.columns.response=answer")


def run(*arguments: str | Path, status: int = 0) -> str:
    command = [sys.executable, str(TOOLS / "prepare_prompts.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    repeated = [*QUESTIONS, {"question": "what is  3", "answer": "3"}]
    write_table(pyarrow.Table.from_pylist(repeated), tmp_path / "source.parquet")
    return tmp_path / "source.parquet"


@pytest.mark.slow
def test_a_run_takes_what_it_makes(source: Path, inputs: Inputs) -> None:
    said = run(source, "--output", inputs.root / "made", "--heldout", "4", *MAPPED)
    assert "16 prompts to train on, 4 held out; 1 that repeat another left out" in said
    for split in ("train", "heldout"):
        inputs.set(f"prompts.{split}", str(inputs.root / "made" / f"{split}.jsonl"))
    inputs.set("warmup.source", "data")
    found = preflight(inputs.config)
    assert len(found.train) == found.train.answered == 16 and len(found.heldout) == 4


@pytest.mark.slow
def test_everything_is_in_one_of_the_files_and_the_seed_decides_where(source: Path, tmp_path: Path) -> None:
    made = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        run(source, "--output", tmp_path / name, "--heldout", "4", "--seed", seed, *MAPPED)
        made[name] = {split: read(tmp_path / name / f"{split}.jsonl") for split in ("train", "heldout")}
    assert made["one"] == made["again"] != made["other"]
    rows = [row for split in made["one"].values() for row in split]
    assert sorted(row["messages"][0]["content"] for row in rows) == sorted(row["question"] for row in QUESTIONS)
    for row in rows:
        (reply,) = row["response"]
        assert reply["content"] == row["messages"][0]["content"].replace("What is", "It is").replace("?", ".")
    limited = run(source, "--output", tmp_path / "few", "--heldout", "2", "--limit", "5", *MAPPED)
    assert "3 prompts to train on, 2 held out" in limited


@pytest.mark.slow
def test_bad_input_is_one_line_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ([source], ["neither a column 'messages' nor 'prompt'"]),
        ([source, *MAPPED, "--heldout", "20"], ["--heldout 20", "less than the 20 prompts"]),
        ([tmp_path / "nowhere.jsonl"], ["nowhere.jsonl", "No such file"]),
        ([source, *MAPPED, "--set", "prompts.colums.id=x"], ["unknown key", "did you mean"]),
    ):
        line = run(*arguments, "--output", tmp_path / "out", status=2)
        assert line.count("\n") == 1 and all(word in line for word in words), line
    assert not (tmp_path / "out").exists()
