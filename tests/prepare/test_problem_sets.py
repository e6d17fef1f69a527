"""Problems of evaluations as a run is prepared with them: framed like prompts, checked, kept, and completed later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from inputs import Inputs

from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.errors import UserError
from megatron_npd.files import write_json
from megatron_npd.prepare.prepare import prepare
from megatron_npd.run_directory import RunDirectory
from megatron_npd.tasks.problem_set import load_problems


def ask(inputs: Inputs, rows: list[dict[str, Any]], **keys: Any) -> RunDirectory:
    path = inputs.root / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs.set("evaluation", [{"task": "exact_match", "path": str(path), **keys}])
    return RunDirectory(inputs.run)


ROWS = [{"id": f"p{i}", "prompt": f"Is it {i}?", "answer": str(i)} for i in range(4)]


def test_problems_are_framed_as_prompts_are(inputs: Inputs) -> None:
    """Those of a run that trains on the very texts: ids are the same to the last."""
    run = ask(inputs, ROWS, problems=3)
    prepare(inputs.config)
    asked = load_prompt_set(run.problems("exact_match"))
    assert [(one.name, one.prompt, one.reference) for one in load_problems(run.problems("exact_match"))] == [
        (f"p{i}", f"Is it {i}?", str(i)) for i in range(3)
    ]
    inputs.train.write_text("".join(json.dumps({"id": row["id"], "prompt": row["prompt"]}) + "\n" for row in ROWS))
    inputs.set("evaluation", [])
    inputs.set("run_directory", str(inputs.root / "other"))
    trained = load_prompt_set(prepare(inputs.config).prompts("train"))
    assert asked.names == trained.names[:3] and all((asked[i] == trained[i]).all() for i in range(3))


def test_a_system_turn_of_all_prompts_is_one_of_problems_too(inputs: Inputs) -> None:
    inputs.set("prompts.system", "Be brief.")
    run = ask(inputs, ROWS[:1])
    prepare(inputs.config)
    inputs.set("prompts.system", "")
    inputs.set("run_directory", str(inputs.root / "other"))
    other = prepare(inputs.config)
    with_system, without = (load_prompt_set(each.problems("exact_match"))[0] for each in (run, other))
    assert len(with_system) > len(without) + len("Be brief.")


@pytest.mark.parametrize("choice", ["refuse", "leave_out"])
def test_a_problem_that_is_trained_on(inputs: Inputs, choice: str) -> None:
    rows = [*ROWS, {"id": "seen", "prompt": "What is 1 plus 1?", "answer": "2"}]
    run = ask(inputs, rows, overlap=choice)
    if choice == "refuse":
        with pytest.raises(UserError, match=r"exact_match: problem 'seen' has the text of a prompt in .*train"):
            prepare(inputs.config)
        assert not run.config.exists()
    else:
        prepare(inputs.config)
        assert len(load_problems(run.problems("exact_match"))) == len(ROWS)


def test_a_problem_that_is_nearly_trained_on_is_said(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    ask(inputs, [{"id": "seen", "prompt": "what is 1 plus 1", "answer": "2"}])
    prepare(inputs.config)
    assert "1 problems differ from a prompt in" in caplog.text


def test_a_problem_that_is_too_long(inputs: Inputs) -> None:
    run = ask(inputs, [*ROWS, {"id": "long", "prompt": "x" * 80, "answer": "2"}])
    with pytest.raises(UserError, match=r"problem 'long' has \d+ tokens; must not exceed .*max_prompt_tokens = 64"):
        prepare(inputs.config)
    inputs.set("prompts.too_long", "leave_out")
    prepare(inputs.config)
    assert len(load_problems(run.problems("exact_match"))) == len(ROWS)


def test_answers_longer_than_the_model_is_are_refused(inputs: Inputs) -> None:
    ask(inputs, ROWS, max_new_tokens=1000)
    with pytest.raises(UserError, match=r"the largest evaluation\.max_new_tokens = 1064: must not exceed"):
        prepare(inputs.config)


def test_a_grader_that_does_not_work_is_found_before_anything_runs(inputs: Inputs) -> None:
    run = ask(inputs, ROWS, task="command", name="mine", options={"command": ["false"]})
    with pytest.raises(UserError, match=r"evaluation mine: an empty answer cannot be graded: .*exit status 1"):
        prepare(inputs.config)
    assert not run.config.exists()


def test_evaluations_may_come_go_and_ask_other_versions_when_a_run_goes_on(inputs: Inputs) -> None:
    prepare(inputs.config)
    run = ask(inputs, ROWS)
    prepare(inputs.config)
    assert len(load_problems(run.problems("exact_match"))) == 4
    ask(inputs, ROWS, problems=2)
    prepare(inputs.config)
    assert len(load_problems(run.problems("exact_match"))) == 2, "without results it may ask something else"
    write_json(run.result("exact_match", 0), {"accuracy": 0.5})
    ask(inputs, ROWS, problems=2, versions="each")
    prepare(inputs.config)
    ask(inputs, ROWS, problems=3)
    with pytest.raises(UserError, match=r"evaluation\.problems = 3 of exact_match: there are results of it"):
        prepare(inputs.config)
    ask(inputs, [*ROWS, ROWS[0] | {"id": "new"}], problems=2)
    with pytest.raises(UserError, match="the content of the path of exact_match: there are results"):
        prepare(inputs.config)
    Path(inputs.values["evaluation"][0]["path"]).unlink()
    prepare(inputs.config)  # what is gone is no other file
    inputs.set("evaluation", [])
    prepare(inputs.config)
    assert "evaluation = []" in run.config.read_text()
