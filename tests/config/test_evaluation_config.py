"""`[[evaluation]]` and `[export]`: what they mean, what is refused, and that they are no part of a run's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from small_config import make_config

from megatron_npd.buffer.plan import make_plan
from megatron_npd.config import Config, load_config
from megatron_npd.errors import UserError

ONE = {"task": "exact_match", "path": "p.jsonl"}


def load(tmp_path: Path, **sections: Any) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(make_config().model_dump() | sections))
    return load_config(path)


def test_it_is_called_as_its_task_unless_it_says_otherwise(tmp_path: Path) -> None:
    config = load(tmp_path, evaluation=[ONE, {**ONE, "name": "other"}])
    assert [one.name for one in config.evaluation] == ["exact_match", "other"]


def test_versions_are_chosen_as_for_the_heldout_kl(tmp_path: Path) -> None:
    asked = [{**ONE, "name": name, "versions": choice} for name, choice in (("a", "each"), ("b", "ends"), ("c", [2]))]
    config = load(tmp_path, evaluation=asked, warmup={"samples_per_prompt": 1}, rounds={"count": 3})
    assert make_plan(config, 1, 1).asked == {"a": {0, 1, 2, 3, 4}, "b": {0, 1, 4}, "c": {2, 4}}


def test_the_written_configuration_says_it_all(tmp_path: Path) -> None:
    config = load(
        tmp_path, evaluation=[{**ONE, "options": {"extract": "x"}}], export={"version": "best", "by": "exact_match"}
    )
    (tmp_path / "again.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "again.toml") == config


def test_evaluations_and_what_is_handed_over_may_change(tmp_path: Path) -> None:
    export = {"version": "best", "by": "heldout_kl"}
    assert load(tmp_path).digest == load(tmp_path, evaluation=[ONE], export=export).digest


def test_engines_hold_the_longest_answer(tmp_path: Path) -> None:
    config = load(tmp_path, evaluation=[ONE, {**ONE, "name": "long", "max_new_tokens": 5000}])
    assert [config.answer_tokens(one) for one in config.evaluation] == [1024, 5000]
    assert (load(tmp_path).longest_sequence, config.longest_sequence) == (2048, 6024)


@pytest.mark.parametrize(
    ("evaluations", "complaint"),
    [
        ([ONE, ONE], "evaluation.name = 'exact_match': two evaluations are called so"),
        ([{**ONE, "name": "heldout_kl"}], "is the name of another score"),
        ([{**ONE, "name": "A b"}], "evaluation.0.name = 'A b'"),
        ([{**ONE, "name": ""}], "evaluation.0.name = ''"),
        ([{**ONE, "tusk": 1}], "unknown key evaluation.0.tusk; did you mean evaluation.task?"),
        ([{"path": "x"}], "missing key evaluation.0.task"),
        ([{**ONE, "versions": [9]}], "evaluation.versions of exact_match = [9]: 9 is no version of this run"),
        ([{**ONE, "temperature": 0.001}], "must be 0, or from 0.01 to 2"),
        ([{**ONE, "samples_per_problem": 4}], "samples_per_problem = 4: must be 1 with temperature = 0"),
    ],
)
def test_wrong_evaluations_are_refused(tmp_path: Path, evaluations: list[Any], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, evaluation=evaluations)
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("export", "complaint"),
    [
        ({"version": "best"}, "export.by = '': must be one of exact_match, heldout_kl"),
        ({"version": "best", "by": "exact"}, "export.by = 'exact': must be one of exact_match, heldout_kl"),
        ({"by": "exact_match"}, "export.by = 'exact_match': needs export.version = 'best'"),
        ({"version": "first"}, "export.version = 'first'"),
    ],
)
def test_a_score_that_is_not_measured_is_refused(tmp_path: Path, export: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, evaluation=[ONE], export=export)
    assert complaint in str(error.value)
