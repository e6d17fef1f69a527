"""Whole runs whose versions answer evaluations: all of them, whatever is killed; and `npd evaluate`, held to plain
transformers answer by answer."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from examined import LETTERS, PROBLEMS, SUMS, examined_inputs
from inputs import Inputs
from npd_runs import npd

from megatron_npd.files import read_json
from megatron_npd.process.metrics import read_metrics
from megatron_npd.run_directory import RunDirectory
from megatron_npd.tasks.intervals import in_words

pytestmark = pytest.mark.slow

JUDGED = "judged"
LAST = 3
BEST = 1
GRADER = """
import json, os, signal, sys
lines = [json.loads(line) for line in sys.stdin]
calls = 0
if len(lines) > 1:  # no trial of `prepare`
    with open(sys.argv[1], "a+") as file:
        file.write("x")
        calls = file.tell()
if calls == 1:
    os.kill(os.getppid(), signal.SIGKILL)
for line in lines:
    print(json.dumps({"correct": calls == 3, "extracted": line["response"][:1]}))
"""
"""Its first call kills the sidecar that asks; so the second is for version 0 again, and the third for version 1: that
is the one that it finds good."""


@pytest.fixture(scope="module")
def inputs(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A warm-up and two rounds, and the `GRADER` as a third evaluation."""
    root = tmp_path_factory.mktemp("examined")
    shutil.copytree(checkpoints, root, dirs_exist_ok=True)
    inputs = examined_inputs(root)
    (root / "grader.py").write_text(GRADER)
    command = [sys.executable, str(root / "grader.py"), str(root / "calls")]
    judged = {"task": "command", "name": JUDGED, "path": str(root / "letters.jsonl"), "options": {"command": command}}
    inputs.set("evaluation", [{**judged, "problems": 3, "versions": "each"}, *inputs.values["evaluation"]])
    inputs.set("warmup", {"samples_per_prompt": 1, "lr": 3e-3})
    inputs.set("rounds", {"count": 2, "prompts_per_round": 4, "epochs_per_round": 1})
    inputs.set("export", {"version": "best", "by": JUDGED})
    npd("run", inputs.path)
    return inputs


@pytest.fixture(scope="module")
def run(inputs: Inputs) -> RunDirectory:
    return RunDirectory(inputs.run)


def results(run: RunDirectory, name: str) -> dict[int, dict[str, Any]]:
    files = {int(path.stem[1:]): path for path in run.results(name).glob("v*.json")}
    return {version: read_json(files[version]) for version in sorted(files)}


def answers(run: RunDirectory, name: str, version: int) -> list[dict[str, Any]]:
    lines = run.result(name, version).with_suffix(".jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_version_answers_what_it_is_to_answer(run: RunDirectory) -> None:
    assert list(results(run, LETTERS)) == [0, 1, 2, LAST]
    assert list(results(run, SUMS)) == [0, 1, LAST]
    assert [result["accuracy"] for result in results(run, JUDGED).values()] == [0, 1, 0, 0]
    for name, problems in ((LETTERS, PROBLEMS), (SUMS, 5), (JUDGED, 3)):
        for version, result in results(run, name).items():
            said = answers(run, name, version)
            assert (result["problems"], result["samples"], result["version"]) == (problems, len(said), version)
            assert result["correct"] == sum(one["correct"] for one in said) == result["accuracy"] * problems
            assert result["wilson_95"][0] <= result["accuracy"] <= result["wilson_95"][1]
    assert {one["response_tokens"] for one in answers(run, SUMS, LAST)} <= set(range(1, 9)), "its own length limit"


def test_a_sidecar_that_was_killed_while_it_answered_is_followed_by_one_that_does(run: RunDirectory) -> None:
    assert "rollout was ended by SIGKILL" in run.log("supervisor").read_text()
    records = [record for record in read_metrics(run.metrics_folder) if record["event"] == "answers"]
    answered = [(record["evaluation"], record["version"]) for record in records]
    assert len(set(answered)) == len(answered) == 11, "nothing is answered twice that was answered"


def test_the_summary_has_them_and_the_best_version_is_handed_over(run: RunDirectory) -> None:
    summary = read_json(run.summary)
    letters = {int(version): result["accuracy"] for version, result in summary["evaluation"][LETTERS].items()}
    assert letters == {version: result["accuracy"] for version, result in results(run, LETTERS).items()}
    assert summary["best_version"][LETTERS] == max(letters, key=lambda version: (letters[version], version))
    assert summary["best_version"][JUDGED] == BEST == summary["student_version"]
    handed = next(iter(run.student.glob("*.safetensors")))
    assert handed.read_bytes() != (run.version(LAST) / handed.name).read_bytes()
    assert handed.read_bytes() == (run.version(BEST) / handed.name).read_bytes()
    assert "right answers" in run.report.read_text()
    assert f"answered by 4 of 4 versions; {100 * letters[LAST]:.1f} % right by version {LAST}" in npd(
        "status", run.root
    )


def greedy_texts(folder: Path, prompts: list[str], limit: int) -> list[str]:
    """What plain transformers answers: its own chat template, its own decoding, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            output = model.generate(**ids, do_sample=False, max_new_tokens=limit, eos_token_id=2, pad_token_id=2)
        said = output[0, ids["input_ids"].shape[1] :].tolist()
        texts.append(tokenizer.decode(said[:-1] if said[-1] == 2 else said))
    return texts


def confirm(folder: Path, rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> int:
    """That these are the answers, and the grades, by means of ours alone; how many are right."""
    texts, right = greedy_texts(folder, [row["prompt"] for row in rows], 24), 0
    for row, text, answer in zip(rows, texts, found, strict=True):
        letters = re.findall("[a-zA-Z]", text)
        correct = bool(letters) and letters[-1] in row["answer"]
        expected = (row["id"], text, letters[-1] if letters else None, correct)
        assert (answer["problem"], answer["response"], answer["extracted"], answer["correct"]) == expected
        right += correct
    return right


def test_teacher_warmed_up_and_finished_student_answer_as_plain_transformers_does(
    inputs: Inputs, run: RunDirectory, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (inputs.root / "letters.jsonl").read_text().splitlines()]
    teacher = npd("evaluate", run.root, "--task", LETTERS, "--teacher", "--output", tmp_path / "teacher.jsonl")
    found = [json.loads(line) for line in (tmp_path / "teacher.jsonl").read_text().splitlines()]
    right = {"the teacher": confirm(inputs.teacher, rows, found)}
    students = npd("evaluate", run.root, "--task", LETTERS, "--version", "each")
    for version in (1, LAST):
        found = answers(run, LETTERS, version)
        right[f"version {version}"] = confirm(run.version(version), rows, found)
    for who, count in right.items():
        assert (
            f"letters by {who}: {count}/{PROBLEMS} = {100 * count / PROBLEMS:.1f} % (95 % Wilson" in teacher + students
        )
    kept = read_json(run.results(LETTERS) / "teacher.json")
    assert kept["version"] == "teacher" and in_words(kept) in teacher
    npd("report", run.root)
    assert read_json(run.summary)["evaluation"][LETTERS]["teacher"]["correct"] == right["the teacher"]

    alone = tmp_path / "alone.jsonl"
    options = ["--with", "options.extract=[a-zA-Z]", "--max-new-tokens", "24", "--path", inputs.root / "letters.jsonl"]
    said = npd("evaluate", run.student, "--task", "exact_match", *options, "--output", alone)
    found = [json.loads(line) for line in alone.read_text().splitlines()]
    assert f"exact_match: {confirm(run.student, rows, found)}/{PROBLEMS} = " in said


def test_an_evaluation_may_come_later_and_an_old_version_answers_again_what_was_lost(
    inputs: Inputs, run: RunDirectory
) -> None:
    """Runs after the others of this file, for it changes the run."""
    before, was_handed_over = answers(run, LETTERS, 1), run.student.stat().st_mtime
    for path in run.results(LETTERS).glob("v000001.*"):
        path.unlink()
    more = {**inputs.values["evaluation"][-1], "name": "more", "seed": 1, "versions": [2]}
    inputs.set("evaluation", [*inputs.values["evaluation"], more])
    npd("run", inputs.path)
    assert list(results(run, "more")) == [2, LAST]
    assert answers(run, LETTERS, 1) == before, "the same, from an engine that began with that version"
    assert answers(run, "more", LAST)[0]["prompt"] != answers(run, SUMS, LAST)[0]["prompt"], "another seed"
    assert run.student.stat().st_mtime == was_handed_over, "nothing is trained again"

    inputs.values["evaluation"][-1]["problems"] = 4
    import subprocess

    command = [sys.executable, "-m", "megatron_npd.cli", "run", str(inputs.path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "evaluation.problems = 4 of more: there are results of it from before" in refused.stderr


def test_a_run_without_rounds_answers_too(checkpoints: Path, tmp_path: Path) -> None:
    """It is on the teacher's responses, and evaluations are all that the student's sidecar is for."""
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    inputs = examined_inputs(tmp_path)
    inputs.set("rounds", {"count": 0})
    inputs.set("warmup", {"samples_per_prompt": 1, "epochs": 3, "lr": 1e-2})
    inputs.set("evaluation", inputs.values["evaluation"][:1])
    npd("run", inputs.path)
    run = RunDirectory(inputs.run)
    assert list(results(run, LETTERS)) == [0, 1] and run.student.is_dir()
    summary = read_json(run.summary)
    assert summary["student_version"] == 1 and summary["heldout_kl_after"] < summary["heldout_kl_before"]
    assert (
        summary["warmup_responses"] == len(inputs.train.read_text().splitlines())
        and summary["trained_on"]["warmup"]["given"] == 0
    )
    log = run.log("supervisor").read_text()
    assert f"{summary['warmup_responses']} responses of the warm-up, {summary['warmup_kept']} kept" in log
