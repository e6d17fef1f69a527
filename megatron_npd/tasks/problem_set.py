"""An evaluation's problems as they lie in a run directory: tokenised prompts, and what graders go by.

`definition.json` comes last and says what they were made of, so that they are asked again only where that is the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_npd.config import EvaluationConfig
from megatron_npd.data.prompts import PromptPart, write_prompt_set
from megatron_npd.errors import UserError
from megatron_npd.files import read_json, write_atomically, write_json
from megatron_npd.tasks.evaluation_task import Problem

DEFINITION = "definition.json"
PROBLEMS_FILE = "problems.jsonl"


def define(evaluation: EvaluationConfig, fingerprint: str | None) -> dict[str, Any]:
    """All that an evaluation's problems and answers depend on, but for the run; `fingerprint`: of its file."""
    return evaluation.model_dump(mode="json", exclude={"versions"}, exclude_defaults=True) | {"content": fingerprint}


def definition_of(folder: Path) -> dict[str, Any] | None:
    """What the problems in a folder were made of; None where there are none, or not all."""
    path = folder / DEFINITION
    return read_json(path) if path.is_file() else None


def save_problems(folder: Path, definition: dict[str, Any], problems: list[Problem], prompts: PromptPart) -> None:
    """Write a folder of problems, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    write_prompt_set(folder, [prompts])
    lines = ({"name": one.name, "prompt": one.question, "reference": one.reference} for one in problems)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(folder / PROBLEMS_FILE, text.encode())
    write_json(folder / DEFINITION, definition)


def load_problems(folder: Path) -> list[Problem]:
    """The problems of a folder; their prompts are their questions.

    Raises:
        UserError: it was not prepared.
    """
    if definition_of(folder) is None:
        raise UserError(f"{folder}: no problems in it; `npd prepare CONFIG` makes them (and `npd run`)")
    rows = map(json.loads, (folder / PROBLEMS_FILE).read_text(encoding="utf-8").splitlines())
    return [Problem(row["name"], row["prompt"], row["reference"]) for row in rows]
