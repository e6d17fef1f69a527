"""What every task of evaluation takes for a right answer, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from small_config import make_config

from megatron_npd.config import EvaluationConfig
from megatron_npd.errors import GraderError, UserError
from megatron_npd.tasks.evaluation_task import Answer, EvaluationTask, Grade, Problem
from megatron_npd.tasks.registry import TASKS, make_task


def task_of(task: str, **keys: Any) -> EvaluationTask:
    evaluation = EvaluationConfig.model_validate({"task": task, **keys})
    return make_task(make_config(evaluation=[evaluation.model_dump()]), evaluation)


def rows(path: Path, *found: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def grade(task: EvaluationTask, reference: Any, response: str) -> Grade:
    (grade,) = task.grade([Answer(Problem("p", "?", reference), response)])
    return grade


def test_problems_are_rows_with_an_answer(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "p.jsonl",
        {"id": "a", "prompt": "1 + 1?", "answer": 2},
        {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": ["4", "four"]},
    )
    first, second = task_of("exact_match", path=path).problems(0)
    assert (first.name, first.question, first.reference) == ("a", "1 + 1?", "2")
    assert (second.name, second.question, second.reference) == ("line-2", "2 + 2?", ["4", "four"])
    assert [one.name for one in task_of("exact_match", path=path).problems(1)] == ["a"]


def test_columns_and_wrap_are_the_evaluations_own(tmp_path: Path) -> None:
    path = rows(tmp_path / "p.jsonl", {"q": "1 + 1?", "solution": "so #### 2", "level": 3})
    options = {"answer_column": "solution", "extract_reference": "#### (.*)"}
    task = task_of("exact_match", path=path, wrap="Solve: {q}", columns={"unused": ["level"]}, options=options)
    (problem,) = task.problems(0)
    assert problem.question == "Solve: 1 + 1?" and grade(task, problem.reference, " 2 ").correct


@pytest.mark.parametrize(
    ("response", "extracted", "correct"),
    [("B", "B", True), ("It is (A), no: (B)", "B", True), ("(B) or (C)", "C", False), ("b", None, False)],
)
def test_exact_match_takes_the_last_match(tmp_path: Path, response: str, extracted: str, correct: bool) -> None:
    task = task_of("exact_match", path="x", options={"extract": r"\b([A-D])\b"})
    assert grade(task, "B", response) == Grade(correct, extracted)


def test_exact_match_without_an_expression_is_of_the_whole() -> None:
    task = task_of("exact_match", path="x", options={"ignore_case": True})
    assert grade(task, ["New York", "NY"], " new  york\n").correct and not grade(task, "NY", "It is NY").correct
    assert not grade(task_of("exact_match", path="x"), "ny", "NY").correct


@pytest.mark.parametrize(
    ("reference", "response", "correct"),
    [
        ("72", "So she has \\boxed{72} left.", True),
        ("72", "The answer is 72.", True),
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("1/2", "$\\frac{2}{4}$", True),
        ("$x^2 + 1$", "\\boxed{1 + x^2}", True),
        ("#### 5", "First I had \\boxed{4}. But that forgets one. It is \\boxed{5}", True),
        ("72", "The answer is 71.", False),
        ("72", "I do not know.", False),
        ("72", "", False),
    ],
)
def test_mathematics_compares_meanings(reference: str, response: str, correct: bool) -> None:
    options = {"extract_reference": "#### (.*)"} if reference.startswith("####") else {}
    assert grade(task_of("mathematics", path="x", options=options), reference, response).correct is correct


def test_mathematics_refuses_an_answer_that_is_none(tmp_path: Path) -> None:
    path = rows(tmp_path / "p.jsonl", {"id": "a", "prompt": "?", "answer": ""})
    with pytest.raises(UserError, match=r"p\.jsonl: problem 'a': the answer '' is nothing that math-verify can read"):
        task_of("mathematics", path=path).problems(0)


@pytest.mark.heavy  # reasoning-gym imports matplotlib
def test_procedural_problems_are_those_of_their_seed() -> None:
    options = {"dataset": "chain_sum", "config": {"min_terms": 2, "max_terms": 2}}
    task = task_of("reasoning_gym", problems=20, seed=3, options=options)
    problems = task.problems(20)
    again = task_of("reasoning_gym", problems=20, seed=3, options=options).problems(20)
    assert problems == again != task_of("reasoning_gym", problems=20, seed=4, options=options).problems(20)
    assert len({problem.name for problem in problems}) == 20
    for problem in problems:
        question, instruction = problem.question.split("\n\n")
        first, sign, second, _ = question.removeprefix(
            "State the final answer to the following arithmetic problem: "
        ).split(" ", 3)
        right = int(first) + (int(second) if sign == "+" else -int(second))
        assert "<answer>" in instruction and json.loads(json.dumps(problem.reference)) == problem.reference
        said = f"Well. <answer>{right}</answer>"
        assert task.grade([Answer(problem, said)]) == [Grade(True, str(right))]
        assert task.grade([Answer(problem, f"<answer>{right + 1}</answer>")]) == [Grade(False, str(right + 1))]
        assert task.grade([Answer(problem, str(right))]) == [Grade(False, None)], "without the tags it is no answer"


@pytest.mark.heavy
def test_procedural_problems_without_an_instruction_take_the_whole_response() -> None:
    task = task_of("reasoning_gym", options={"dataset": "chain_sum", "instruction": ""})
    (problem,) = task.problems(1)
    assert task.grade([Answer(problem, f" {problem.reference['answer']}\n")])[0].correct
    assert len(task.problems(0)) == 500


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"options": {"dataset": "chain_sums"}}, "no such data set; did you mean chain_sum?"),
        ({"options": {}}, "missing key dataset"),
        ({"options": {"dataset": "chain_sum", "config": {"min_term": 2}}}, "chain_sum refuses it:.*min_term"),
        ({"options": {"dataset": "chain_sum", "config": {"min_terms": 5, "max_terms": 2}}}, "chain_sum refuses it"),
        ({"options": {"dataset": "chain_sum", "config": {"seed": 2}}}, "config.seed: must be left out"),
        ({"options": {"dataset": "chain_sum"}, "path": "x.jsonl"}, "makes its own problems"),
    ],
)
def test_procedural_tasks_refuse(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        task_of("reasoning_gym", **keys)


ECHO = "import json,sys\nfor line in sys.stdin:\n    one = json.loads(line)\n    print({})"


def command(code: str, **options: Any) -> EvaluationTask:
    return task_of("command", name="mine", path="x", options={"command": [sys.executable, "-c", code], **options})


def test_a_command_gets_all_answers_and_writes_a_verdict_for_each() -> None:
    task = command(ECHO.format("json.dumps(one['response'] == one['reference'])"))
    answers = [Answer(Problem("a", "?", "1"), "1"), Answer(Problem("b", "?", "1"), "2")]
    assert task.grade(answers) == [Grade(True), Grade(False)]
    judged = command(ECHO.format("json.dumps({'correct': 1, 'extracted': one['prompt'] + one['name']})"))
    assert judged.grade(answers) == [Grade(True, "?a"), Grade(True, "?b")]


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import sys; print('x', file=sys.stderr); sys.exit('no compiler here')", "exit status 1: no compiler here"),
        ("pass", "wrote 0 lines for 1 answers"),
        ("print('right')", "wrote 'right'; each line must be"),
        ("print(0.5)", "wrote '0.5'; each line must be"),
    ],
)
def test_a_command_that_fails_says_why(code: str, complaint: str) -> None:
    with pytest.raises(GraderError, match=complaint) as error:
        grade(command(code), "1", "1")
    assert "evaluation.options.command of mine" in str(error.value) and "\n" not in str(error.value)


def test_a_command_is_not_waited_for_without_end() -> None:
    with pytest.raises(GraderError, match=r"not done after options\.timeout_seconds = 0\.2"):
        grade(command("import time; time.sleep(9)", timeout_seconds=0.2), "1", "1")


@pytest.mark.parametrize(
    ("task", "keys", "complaint"),
    [
        ("exact_mach", {}, "must be one of command, exact_match, .*; did you mean exact_match?"),
        ("exact_match", {"options": {"extrct": "x"}}, "unknown key extrct; did you mean extract?"),
        ("exact_match", {"options": {"extract": "("}}, r"'\(' is no regular expression"),
        ("exact_match", {"options": {"ignore_case": 1}}, "ignore_case = 1"),
        ("command", {"options": {"command": []}}, "command = "),
        ("command", {}, "missing key command"),
    ],
)
def test_wrong_keys_are_refused(task: str, keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        task_of(task, **keys)


@pytest.mark.parametrize(
    ("found", "keys", "complaint"),
    [
        ([{"prompt": "?"}], {}, "p.jsonl:1: must have a right answer in 'answer'"),
        ([{"prompt": "?", "answer": "1", "hint": "x"}], {}, r"'hint' is read by nothing.*\[evaluation\.columns\]"),
        ([{"id": 1, "prompt": "?", "answer": "1"}] * 2, {}, "p.jsonl:2: id '1' was already used"),
        ([], {}, "no problems"),
        ([{"prompt": "?", "answer": "1"}], {"options": {"extract_reference": "x"}}, "no right answer in '1'"),
    ],
)
def test_wrong_rows_are_refused(
    tmp_path: Path, found: list[dict[str, Any]], keys: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        task_of("exact_match", path=rows(tmp_path / "p.jsonl", *found), **keys).problems(0)


def test_a_path_is_needed() -> None:
    with pytest.raises(UserError, match=r"evaluation\.path of exact_match: missing"):
        task_of("exact_match").problems(0)


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(
        UserError, match=r"needs the Python package math-verify.*pip install 'megatron_npd\[evaluate\]'"
    ):
        task_of("mathematics", path="x")


def test_every_task_is_called_as_configurations_may_call_it() -> None:
    for name in TASKS:
        assert EvaluationConfig(task=name).name == "" or EvaluationConfig.model_validate({"task": name}).name == name
