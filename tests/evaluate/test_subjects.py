"""What `npd evaluate` is asked about, which evaluations it means, and how lm-evaluation-harness is called."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from inputs import Inputs

from megatron_npd.errors import UserError
from megatron_npd.evaluate.by_harness import evaluate_by_harness
from megatron_npd.evaluate.by_tasks import evaluations_asked
from megatron_npd.evaluate.subjects import Asked, place_of_subjects
from megatron_npd.files import read_json
from megatron_npd.prepare.prepare import prepare

STAND_IN = """
import json, pathlib, sys
pathlib.Path(__file__).with_name("called.jsonl").open("a").write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(3 if "fails" in sys.argv else 0)
"""


@pytest.fixture
def run(inputs: Inputs) -> Path:
    """A run with three versions and an evaluation."""
    path = inputs.root / "p.jsonl"
    path.write_text('{"prompt": "Is it?", "answer": "yes"}\n')
    inputs.set("evaluation", [{"task": "exact_match", "name": "mine", "path": str(path)}])
    root = prepare(inputs.config).root
    for version in range(3):
        shutil.copytree(inputs.student, root / "weights" / f"v{version:06d}")
    return root


def names(place: Asked) -> list[str]:
    return [subject.called for subject in place.subjects]


def test_a_runs_last_version_unless_it_is_said(run: Path, inputs: Inputs) -> None:
    assert names(place_of_subjects(run, None, False, [])) == ["version 2"]
    assert names(place_of_subjects(run, "each", False, [])) == ["version 0", "version 1", "version 2"]
    assert names(place_of_subjects(run, "1", False, [])) == ["version 1"]
    (teacher,) = place_of_subjects(run, None, True, []).subjects
    assert (teacher.called, teacher.folder) == ("the teacher", inputs.teacher)


def test_a_checkpoint_has_every_default_but_what_is_set(inputs: Inputs) -> None:
    place = place_of_subjects(inputs.student, None, False, ["prompts.system=Be brief."])
    assert names(place) == [""] and place.run is None and place.config.prompts.system == "Be brief."
    assert place.config.prompts.max_prompt_tokens == 128, "half of what the model has room for"


@pytest.mark.parametrize(
    ("version", "teacher", "overrides", "complaint"),
    [
        ("7", False, [], "--version 7: must be last, each or a version that .*: 0, 1, 2"),
        ("newest", False, [], "--version newest: must be last, each"),
        ("1", True, [], "--version 1: must be left out with --teacher"),
        (None, False, ["seed=1"], "--set seed=1: must be left out with a run directory"),
    ],
)
def test_what_does_not_fit_a_run_is_refused(
    run: Path, version: str | None, teacher: bool, overrides: list[str], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        place_of_subjects(run, version, teacher, overrides)


@pytest.mark.parametrize(("version", "teacher"), [("1", False), (None, True)])
def test_a_checkpoint_has_no_versions(inputs: Inputs, version: str | None, teacher: bool) -> None:
    with pytest.raises(UserError, match="needs a run directory"):
        place_of_subjects(inputs.student, version, teacher, [])


def test_which_evaluations_are_meant(run: Path, inputs: Inputs) -> None:
    place = place_of_subjects(run, None, False, [])
    assert evaluations_asked(place, [], {}, []) == place.config.evaluation
    (fewer,) = evaluations_asked(place, ["mine"], {"problems": 2}, ["options.extract=.*"])
    assert (fewer.task, fewer.name, fewer.problems, fewer.options) == ("exact_match", "mine", 2, {"extract": ".*"})
    (other,) = evaluations_asked(place, ["reasoning_gym"], {}, ["options.dataset=chain_sum", "seed=4"])
    assert (other.task, other.name, other.seed, other.options) == (
        "reasoning_gym",
        "reasoning_gym",
        4,
        {"dataset": "chain_sum"},
    )
    with pytest.raises(UserError, match="--task mine: unknown key sed; did you mean seed"):
        evaluations_asked(place, ["mine"], {}, ["sed=4"])
    with pytest.raises(UserError, match="--task: missing; names a task"):
        evaluations_asked(place_of_subjects(inputs.student, None, False, []), [], {}, [])


def test_the_harness_is_run_on_every_subject(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it: what it is called with is all that is ours."""
    package = tmp_path / "packages" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    place = place_of_subjects(run, "each", False, [])
    said: list[str] = []
    assert evaluate_by_harness(place, "gsm8k,ifeval", 10, None, said.append) == 0
    calls = [json.loads(line) for line in (package / "called.jsonl").read_text().splitlines()]
    assert len(calls) == 3 == len(said) and said[0].startswith(f"{sys.executable} -m lm_eval")
    for version, call in enumerate(calls):
        options = dict(zip(call, [*call[1:], ""], strict=True))
        assert options["--model"] == "hf" and options["--tasks"] == "gsm8k,ifeval" and options["--limit"] == "10"
        assert options["--model_args"] == f"pretrained={run}/weights/v{version:06d},dtype=float32"
        assert "--apply_chat_template" in call
        assert options["--output_path"] == f"{run}/evaluation/lm_eval/version_{version}"
    assert evaluate_by_harness(place, "fails", 0, None, said.append) == 3 and len(said) == 4, (
        "the first that fails ends it"
    )


def test_without_the_harness_one_line_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"--lm-eval gsm8k: .*pip install 'megatron_npd\[lm-eval\]'"):
        evaluate_by_harness(place_of_subjects(run, None, False, []), "gsm8k", 0, None, print)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_checkpoint_in_float32_answers_in_it_on_every_machine(inputs: Inputs, key: str) -> None:
    path = inputs.student / "config.json"
    stored = {name: value for name, value in read_json(path).items() if name not in ("dtype", "torch_dtype")}
    for there, expected in (("float32", "float32"), ("bfloat16", "auto"), (None, "auto")):
        path.write_text(json.dumps(stored | ({key: there} if there else {})))
        assert place_of_subjects(inputs.student, None, False, []).config.models.dtype == expected
    path.write_text(json.dumps(stored | {key: "float32"}))
    chosen = place_of_subjects(inputs.student, None, False, ["models.dtype=bfloat16"])
    assert chosen.config.models.dtype == "bfloat16"
