"""What `npd evaluate` is asked about: a checkpoint by itself, versions of a run, or a run's teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_npd.config import Config, make_config
from megatron_npd.errors import UserError
from megatron_npd.files import read_json
from megatron_npd.models.hf_checkpoint import check_checkpoint
from megatron_npd.prepare.prepare import load_run_config
from megatron_npd.roles import ANNOTATOR, TEACHER
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION
from megatron_npd.versions.manifest import published_versions

LAST, EACH = "last", "each"


@dataclass(frozen=True)
class Subject:
    """One model that is asked."""

    folder: Path
    version: int
    """Of a run; TEACHER_VERSION: a checkpoint by itself, the teacher among them."""
    called: str
    """In words that follow the name of an evaluation; "" where there is nothing to tell apart."""


@dataclass(frozen=True)
class Asked:
    """Where the subjects lie, and the configuration by which they are asked."""

    config: Config
    run: RunDirectory | None
    subjects: list[Subject]
    """By version."""


def place_of_subjects(folder: Path, version: str | None, teacher: bool, overrides: list[str]) -> Asked:
    """A run directory, or a checkpoint by itself.

    Args:
        version: `--version`: a number, last or each; None: last.
        overrides: `--set`, of a checkpoint by itself: a run has its configuration.

    Raises:
        UserError: it is neither, an option is for the other, or there is no such version.
    """
    run = RunDirectory(folder)
    if not run.config.is_file():
        for option, given in (("--version", version), ("--teacher", teacher)):
            if given:
                raise UserError(f"{option}: needs a run directory; {folder} has no {run.config.name}")
        return Asked(_config_of_checkpoint(folder, overrides), None, [Subject(folder, TEACHER_VERSION, "")])
    if overrides:
        raise UserError(f"--set {overrides[0]}: must be left out with a run directory, which has its configuration")
    config = load_run_config(run.config)
    if not teacher:
        return Asked(config, run, _versions(run, version or LAST))
    if version:
        raise UserError(f"--version {version}: must be left out with --teacher")
    return Asked(config, run, [Subject(Path(config.models.teacher), TEACHER_VERSION, f"the {TEACHER}")])


def _versions(run: RunDirectory, wanted: str) -> list[Subject]:
    there = published_versions(run)
    if wanted in (LAST, EACH):
        numbers = there if wanted == EACH else there[-1:]
    else:
        numbers = [int(wanted)] if wanted.isdecimal() and int(wanted) in there else []
    if not numbers:
        listed = ", ".join(map(str, there)) or "none yet"
        raise UserError(f"--version {wanted}: must be {LAST}, {EACH} or a version that {run.root} has: {listed}")
    return [Subject(run.version(number), number, f"version {number}") for number in numbers]


def _config_of_checkpoint(folder: Path, overrides: list[str]) -> Config:
    """Every default, for a model that is student and teacher at once. A checkpoint in float32 answers in float32: what
    it scores must not depend on whether the processor it is asked on has bfloat16."""
    checkpoint = check_checkpoint("PLACE", folder)
    stored = read_json(folder / "config.json")
    in_float32 = stored.get("dtype", stored.get("torch_dtype")) == "float32"
    raw: dict[str, Any] = {
        "run_directory": "-",
        "models": {
            "teacher": str(folder),
            "student": str(folder),
            "dtype": "float32" if in_float32 else "auto",
        },
        "prompts": {"train": "-", "heldout": "-", "max_prompt_tokens": min(1024, checkpoint.dims.max_positions // 2)},
        ANNOTATOR: {"pack_length": 1 << 20},
        "training": {"sequence_length": 1 << 20},
    }
    return make_config(raw, overrides, str(folder))
