"""How fast the roles of one kind of run are on one kind of machine: measured in a run, or given in a TOML file."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field, ValidationError

from megatron_npd.buffer.plan import epochs_of
from megatron_npd.config import Config, Section, load_config
from megatron_npd.errors import UserError
from megatron_npd.process.metrics import read_metrics
from megatron_npd.roles import ANNOTATOR, ROLLOUT, ROLLOUT_TEACHER, SUPERVISOR, TRAINER
from megatron_npd.run_directory import WARMUP_STAGE, RunDirectory
from megatron_npd.schema import Event, StepMetric

Record = dict[str, Any]


class SampleRates(Section):
    """What the samples are like."""

    prompt_tokens: float = Field(gt=0.0)
    """Mean length of a prompt, tokens."""
    response_tokens: float = Field(gt=0.0)
    """Mean length of a response, tokens."""
    kept_share: float = Field(gt=0.0, le=1.0)
    """Share of the student's responses that are kept."""
    warmup_kept_share: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the teacher's responses that are kept."""
    kept_tokens: float = Field(gt=0.0)
    """Mean length of a kept prompt and response together, tokens."""
    prefilled_tokens: float = Field(0.0, ge=0.0)
    """Tokens the annotators prefill for one of the student's responses, on average over those that are not scored
    because they are cut; 0: as if all were scored."""
    warmup_prefilled_tokens: float = Field(0.0, ge=0.0)
    """The same for one of the teacher's responses."""


class LaunchRates(Section):
    """`npd` itself."""

    start_seconds: float = Field(ge=0.0)
    """From the command until the roles are started."""
    finish_seconds: float = Field(0.0, ge=0.0)
    """From the end of the last role's work to the end of the run: the roles leave, the report is written."""


class TrainerRates(Section):
    """One data-parallel replica of the trainer."""

    start_seconds: float = Field(ge=0.0)
    """From its launch until it can train."""
    tokens_per_second: float = Field(gt=0.0)
    """Positions of packs, forward and backward."""
    step_seconds: float = Field(0.0, ge=0.0)
    """Of every optimizer step beside that: reducing gradients over replicas, updating."""
    publish_stall_seconds: float = Field(0.0, ge=0.0)
    """Training stands still for a publication."""
    publish_seconds: float = Field(0.0, ge=0.0)
    """From the beginning of a publication until the version is visible."""
    checkpoint_seconds: float = Field(0.0, ge=0.0)
    """Training stands still for a checkpoint."""


class AnnotatorRates(Section):
    """One annotator."""

    start_seconds: float = Field(ge=0.0)
    """From its launch until it can annotate."""
    tokens_per_second: float = Field(gt=0.0)
    """Tokens prefilled, over teacher and student."""
    load_seconds: float = Field(0.0, ge=0.0)
    """To load another version of the student."""


class RolloutRates(Section):
    """One sidecar."""

    start_seconds: float = Field(ge=0.0)
    """From its launch until it can generate, or from the first version's publication if that is later."""
    tokens_per_second: float = Field(gt=0.0)
    """Response tokens, with a unit of work in the engine."""
    refresh_seconds: float = Field(0.0, ge=0.0)
    """To move to another version."""


class Rates(Section):
    """Everything the time estimate needs to know that the configuration does not say."""

    samples: SampleRates
    launch: LaunchRates
    trainer: TrainerRates
    annotator: AnnotatorRates
    rollout: RolloutRates
    rollout_teacher: RolloutRates

    def to_toml(self) -> str:
        """What `read_rates` reads."""
        return tomli_w.dumps(self.model_dump())


def read_rates(path: Path) -> Rates:
    """Rates of a TOML file, or those measured in a run, of its directory.

    Raises:
        UserError: neither is there, a key is missing, unknown or breaks its rule, or the run lacks a measurement.
    """
    try:
        if path.is_dir():
            return rates_of_run(RunDirectory(path))
        return Rates.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot read the rates: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        value = "" if fault["type"] == "missing" else f" = {fault['input']!r}"
        raise UserError(f"{path}: {key}{value}: {fault['msg'][0].lower()}{fault['msg'][1:]}") from None


def rates_of_run(run: RunDirectory) -> Rates:
    """The rates of a run that has trained on at least one round.

    Means over the run, so that what varies adds up to what was spent.

    Raises:
        UserError: it is no run directory, or something was not measured yet.
    """
    if not run.config.is_file():
        raise UserError(f"{run.root}: no config.toml in it; must be a run directory or a TOML file of rates")
    config = load_config(run.config)
    measured = _Measured(run)
    steps = measured.all(TRAINER, Event.STEP)
    units = measured.all(ANNOTATOR, Event.UNIT)
    rollouts = measured.all(ROLLOUT, Event.UNIT)
    everything = rollouts + measured.all(ROLLOUT_TEACHER, Event.UNIT)
    by_students = [unit for unit in units if unit["stage"] != WARMUP_STAGE and not unit.get("given")]
    if not by_students:
        raise measured.lacks(ANNOTATOR, "unit of a round")
    by_teacher = [unit for unit in units if unit["stage"] == WARMUP_STAGE]
    return Rates(
        samples=SampleRates(
            prompt_tokens=_ratio(everything, "prompt_tokens", "samples"),
            response_tokens=_ratio(everything, "response_tokens", "samples"),
            kept_share=_ratio(by_students, "kept", "samples"),
            warmup_kept_share=_ratio(by_teacher, "kept", "samples") if by_teacher else 1.0,
            kept_tokens=_mean_positions(config, steps, units, measured.some(TRAINER, Event.STAGE)),
            prefilled_tokens=_ratio(by_students, "tokens", "samples"),
            warmup_prefilled_tokens=_ratio(by_teacher, "tokens", "samples") if by_teacher else 0.0,
        ),
        launch=LaunchRates(
            start_seconds=_mean(measured.all(SUPERVISOR, Event.START), "import_seconds"),
            finish_seconds=measured.finish_seconds(),
        ),
        trainer=TrainerRates(
            start_seconds=measured.start_seconds(TRAINER),
            tokens_per_second=_ratio(steps, StepMetric.TOKENS, "seconds") / config.training.data_parallel_size,
            publish_stall_seconds=_mean(measured.all(TRAINER, Event.PUBLISH), "stall_seconds"),
            publish_seconds=_mean(measured.all(TRAINER, Event.PUBLISH), "seconds"),
            checkpoint_seconds=_mean(measured.all(TRAINER, Event.CHECKPOINT), "seconds"),
        ),
        annotator=AnnotatorRates(
            start_seconds=measured.start_seconds(ANNOTATOR),
            tokens_per_second=_ratio(units, "tokens", "seconds"),
            load_seconds=_mean(measured.all(ANNOTATOR, Event.REFRESH), "seconds"),
        ),
        rollout=RolloutRates(
            start_seconds=measured.start_seconds(ROLLOUT),
            tokens_per_second=_ratio(rollouts, "response_tokens", "seconds"),
            refresh_seconds=_mean(measured.some(ROLLOUT, Event.REFRESH), "seconds"),
        ),
        rollout_teacher=RolloutRates(
            start_seconds=measured.start_seconds(ROLLOUT_TEACHER),
            tokens_per_second=_ratio(measured.all(ROLLOUT_TEACHER, Event.UNIT), "response_tokens", "seconds"),
        ),
    )


class _Measured:
    """Records of a run by role and event. Work that was redone after a restart is counted as often as it was done."""

    def __init__(self, run: RunDirectory):
        self._root = run.root
        self._records: dict[tuple[str, str], list[Record]] = defaultdict(list)
        self._last_work, self._end = 0.0, 0.0
        folder = run.root / "metrics"
        for record in read_metrics(folder) if folder.is_dir() else []:
            role = record["role"]
            self._records[role, record["event"]].append(record)
            self._end = max(self._end, record["time"])
            if role != SUPERVISOR:
                self._last_work = max(self._last_work, record["time"])

    def some(self, role: str, event: str) -> list[Record]:
        return self._records[role, event]

    def all(self, role: str, event: str) -> list[Record]:
        if not self._records[role, event]:
            raise self.lacks(role, event)
        return self._records[role, event]

    def lacks(self, role: str, what: str) -> UserError:
        return UserError(f"{self._root}: no {what} of the {role} was measured; must be a run that trained on a round")

    def start_seconds(self, role: str) -> float:
        starts = self.all(role, Event.START)
        return _mean(starts, "import_seconds") + _mean(starts, "seconds")

    def finish_seconds(self) -> float:
        return max(self._end - self._last_work, 0.0)


def _mean_positions(
    config: Config, steps: Iterable[Record], units: Iterable[Record], stages: Iterable[Record]
) -> float:
    """Mean tokens of the samples that were trained on: of all that were kept, but of given responses only those that
    the trainer took beside the others, as its records of `stages` say."""
    distinct = {record["step"]: record for record in steps}.values()
    tokens = sum(
        r[StepMetric.TOKENS] * r[StepMetric.PACKING_EFFICIENCY] / epochs_of(config, r["stage"]) for r in distinct
    )
    kept: dict[str, int] = defaultdict(int)
    for unit in units:
        kept[unit["stage"]] += unit["kept"]
    samples = kept | {record["stage"]: record["samples"] for record in stages}
    return tokens / max(sum(samples[stage] for stage in {record["stage"] for record in distinct}), 1)


def _ratio(records: Iterable[Record], above: str, below: str) -> float:
    return sum(record[above] for record in records) / sum(record[below] for record in records)


def _mean(records: list[Record], key: str) -> float:
    return sum(record.get(key, 0.0) for record in records) / max(len(records), 1)
