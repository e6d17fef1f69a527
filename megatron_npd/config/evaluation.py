"""The configuration's tables of what versions are asked, `[[evaluation]]`, and of which version is handed over.

None of this decides what is trained, so none of it belongs to a run's identity: evaluations may come, go and be asked
of other versions when a run is started again. What one asks stays as it is from its first result on.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_npd.config.inputs import ColumnsConfig
from megatron_npd.config.section import Section
from megatron_npd.config.versions import VersionChoice

HELDOUT_KL = "heldout_kl"
"""The score of a version that needs no evaluation of its own."""


class EvaluationConfig(Section):
    """One `[[evaluation]]`: problems, how they are answered, and by which versions."""

    task: str
    """Who makes the problems and grades the answers: a name of `tasks/registry.py`."""
    name: str = Field("", pattern=r"^[a-z0-9_-]+$")
    """What its results are called, and their folder; left out: as the task."""
    path: str = ""
    """Problems of the user's, as `prompts.train` takes prompts: for the tasks that read some."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which field of a row of `path` holds what, as in `[prompts.columns]`."""
    wrap: str = ""
    """What the user says, made of a row's fields, as `prompts.wrap`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the task itself can be told; each task's file lists its own."""
    problems: int = Field(0, ge=0)
    """The first so many problems; 0: all there are, of a task that makes its own 500."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the problems that a task makes, and of sampling."""
    overlap: Literal["refuse", "leave_out"] = "refuse"
    """What is done about a problem that is a training prompt to the letter."""
    samples_per_problem: int = Field(1, ge=1)
    """Answers to each problem. More than one tell apart only where `temperature` is not 0."""
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    """Sampling temperature; 0: the likeliest token each time."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling mass."""
    max_new_tokens: int = Field(0, ge=0)
    """Length limit of an answer, tokens; 0: `rollout.max_new_tokens`."""
    versions: VersionChoice = "ends"
    """Which versions answer: each; ends (0, the one that the rounds start from, the last); last; or these numbers and
    the last."""

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float) -> float:
        if 0.0 < value < 0.01:
            raise ValueError(f"{value}: must be 0, or from 0.01 to 2 (vLLM takes 0.01 for what is less)")
        return value

    @model_validator(mode="before")
    @classmethod
    def _name_after_task(cls, raw: Any) -> Any:
        return raw | {"name": raw["task"]} if isinstance(raw, dict) and "task" in raw and "name" not in raw else raw

    @model_validator(mode="after")
    def _check_samples(self) -> EvaluationConfig:
        if self.samples_per_problem > 1 and self.temperature == 0.0:
            raise ValueError(
                f"samples_per_problem = {self.samples_per_problem}: must be 1 with temperature = 0, at which every "
                "answer to a problem is the same"
            )
        return self


class ExportConfig(Section):
    """Which version `student_hf/` holds; decided once, when the training is over and the scores are there."""

    version: Literal["last", "best"] = "last"
    """last: the finished student; best: the one with the best score, of those with the same the later."""
    by: str = ""
    """The score of best: the name of an evaluation (its accuracy), or heldout_kl. Versions without it do not count."""


def check_evaluations(evaluations: list[EvaluationConfig], export: ExportConfig) -> None:
    """Names must tell evaluations apart, and the score of `export` must be one that is measured.

    Raises:
        ValueError: a rule is broken.
    """
    names = [evaluation.name for evaluation in evaluations]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"evaluation.name = {name!r}: two evaluations are called so; each needs a name of its own")
        if name == HELDOUT_KL:
            raise ValueError(f"evaluation.name = {name!r}: is the name of another score")
    if export.version == "best" and export.by not in (known := [*names, HELDOUT_KL]):
        raise ValueError(f"export.by = {export.by!r}: must be one of {', '.join(known)} with export.version = 'best'")
    if export.version == "last" and export.by:
        raise ValueError(f"export.by = {export.by!r}: needs export.version = 'best'")
