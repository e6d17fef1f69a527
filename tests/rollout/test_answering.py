"""What is asked of an engine for an evaluation, and what becomes of graded answers. No engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_npd.config import EvaluationConfig
from megatron_npd.files import read_json, write_json
from megatron_npd.rollout.answering import Examination, Examined, score
from megatron_npd.tasks.evaluation_task import Problem
from megatron_npd.tasks.intervals import wilson


def examination(**keys: Any) -> Examination:
    evaluation = EvaluationConfig.model_validate({"task": "exact_match", "name": "mine", **keys})
    problems = [Problem(name, "?", "1") for name in "ab"]
    nothing: Any = None
    return Examination(evaluation, nothing, problems, [np.array([5, 6]), np.array([7])], 9, [2], nothing)


def answer(correct: bool, tokens: int = 4, truncated: bool = False) -> dict[str, Any]:
    return {"correct": correct, "response_tokens": tokens, "truncated": truncated}


def test_greedy_unless_it_says_otherwise() -> None:
    first, second = examination().requests()
    assert (first.prompt_ids, second.prompt_ids) == ([5, 6], [7])
    assert (first.temperature, first.top_p, first.max_new_tokens, first.stop_token_ids) == (0.0, 1.0, 9, [2])


def test_every_sample_has_a_seed_of_its_own_and_always_the_same() -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "samples_per_problem": 3}
    asked = examination(**sampling).requests()
    assert [one.prompt_ids for one in asked] == [[5, 6]] * 3 + [[7]] * 3
    assert asked == examination(**sampling).requests() and len({one.seed for one in asked}) == 6
    assert {one.seed for one in examination(**sampling, seed=1).requests()}.isdisjoint(one.seed for one in asked)


def test_samples_of_a_problem_make_no_figure_surer() -> None:
    """Eight samples of two problems say as little of other problems as two do."""
    figures = score([answer(True)] * 4 + [answer(False, 8, truncated=True)] * 4, problems=2)
    assert (figures["correct"], figures["samples"], figures["accuracy"]) == (4, 8, 0.5)
    assert figures["wilson_95"] == list(wilson(1, 2)) != list(wilson(4, 8))
    assert (figures["mean_response_tokens"], figures["truncated"]) == (6.0, 0.5)


def test_what_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "mine" / "v000001.json"
    assert Examined({"accuracy": 1.0}, [answer(True)]).save(path)
    assert not Examined({"accuracy": 0.0}, [answer(False)]).save(path)
    assert read_json(path) == {"accuracy": 1.0} and '"correct": true' in path.with_suffix(".jsonl").read_text()


def test_answers_without_figures_are_left_from_one_who_died_and_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "v000001.json"
    write_json(path.with_suffix(".jsonl"), "half")
    assert Examined({"accuracy": 1.0}, [answer(True)]).save(path)
    assert "half" not in path.with_suffix(".jsonl").read_text()


@pytest.mark.parametrize("temperature", [0.0, 0.01, 2.0])
def test_temperatures_that_vllm_takes(temperature: float) -> None:
    assert examination(temperature=temperature).requests()[0].temperature == temperature
