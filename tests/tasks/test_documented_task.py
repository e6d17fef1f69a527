"""The task that docs/extending.md shows is one: its code, and a line in the registry, are all that it takes."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT
from small_config import make_config

from megatron_npd.config import EvaluationConfig
from megatron_npd.errors import UserError
from megatron_npd.tasks import registry
from megatron_npd.tasks.evaluation_task import Answer, Grade


def documented_code() -> str:
    section = (ROOT / "docs" / "extending.md").read_text().split("## A task of evaluation")[1]
    return textwrap.dedent(section.split("```python\n")[1].split("```")[0])


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("megatron_npd.tasks.backwards")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(documented_code(), "docs/extending.md", "exec"), module.__dict__)
    monkeypatch.setitem(registry.TASKS, "backwards", module.Backwards)
    return module


@pytest.mark.usefixtures("documented")
def test_the_documented_task_works_from_the_configuration_on() -> None:
    evaluation = EvaluationConfig.model_validate({"task": "backwards", "options": {"letters": 7}})
    task = registry.make_task(make_config(), evaluation)
    problems = task.problems(3)
    assert problems == task.problems(3) and len({one.prompt for one in problems}) == 3
    first = problems[0]
    assert str(first.prompt).endswith(first.reference[::-1]) and len(first.reference) == 7
    answers = [Answer(first, f" {first.reference}\n"), Answer(first, "no")]
    assert task.grade(answers) == [Grade(True, first.reference), Grade(False, "no")]
    with pytest.raises(UserError, match="unknown key letter; did you mean letters"):
        registry.make_task(make_config(), evaluation.model_copy(update={"options": {"letter": 1}}))


def test_the_documented_code_is_as_ours(tmp_path: Path) -> None:
    """Formatted and linted like every file."""
    import subprocess

    path = tmp_path / "backwards.py"
    path.write_text(documented_code())
    for check in (["format", "--check"], ["check"]):
        command = [Path(sys.executable).with_name("ruff"), *check, "--config", ROOT / "ruff.toml", path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
