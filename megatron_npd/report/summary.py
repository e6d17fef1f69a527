"""The summary of a run: one dictionary, computed from what lies in the run directory and from nothing else.

It works on a finished, a running and a broken run: what is not known yet is None. Work that was redone after a
restart counts once: samples are counted in the shards, optimizer steps by their number.

Keys of `summarise`, in nats a token, seconds and tokens unless said otherwise:

    rollouts_generated, rollouts_kept, rollouts_rejected {reason: n}, rollouts_by_round {stage: the three}
        of responses that the student sampled
    warmup_responses, warmup_kept   of the teacher or given
    trained_on {stage: {samples, given: those of them that are given responses}}
    rounds (trained on so far), refreshes (changes of the snapshot that sampled the judged rollouts), optimizer_steps
    trained_tokens (response tokens, summed over steps), packing_efficiency (tokens / (tokens + padding))
    heldout_kl_before, _after_warmup, _after, _by_version {version: kl}, _reduction {whole_run, rounds: fraction}
    heldout_top1_agreement_by_version {version: fraction of tokens whose likeliest next id is the teacher's}
    evaluation {name: {version, or teacher: {accuracy, wilson_95 [low, high], correct, samples, problems, truncated}}}
    best_version {score: version}   score: an evaluation's name, or heldout_kl; of versions with the same, the later
    student_version   the one in student_hf
    tokens_per_second_by_role {role: tokens / busy second of one worker; computed ones for trainer and annotator,
        response tokens for the rollout roles}
    wall_seconds_by_phase {role: {stage or event: busy seconds}, total: first to last record}
    near_policy_kl {max, last}, parity {version: {mean, max}}
    publishing {version: {bytes, seconds until it was visible, stall_seconds of training}}
    attention_backend, versions {package: version}, git_commit, settings {what a reader needs to judge the figures}
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.buffer.evaluations import best_of, results_of, scores
from megatron_npd.buffer.plan import make_plan
from megatron_npd.buffer.retention import collected
from megatron_npd.buffer.shards import CorruptShardError, ShardFile
from megatron_npd.config import HELDOUT_KL, Config
from megatron_npd.files import read_json, write_json
from megatron_npd.process.metrics import busy_span, read_metrics
from megatron_npd.report.page import render_report
from megatron_npd.report.plots import distinct_steps
from megatron_npd.roles import TEACHER, TRAINER
from megatron_npd.run_directory import WARMUP_STAGE, RunDirectory, round_stage
from megatron_npd.schema import GIVEN_VERSION, TEACHER_VERSION, Event, StepMetric, Verdict
from megatron_npd.versions.manifest import published_versions

logger = logging.getLogger(__name__)

Record = dict[str, Any]
SCORES = {"ifd_teacher": "float64", "ifd_student": "float64", "delta_ifd": "float64"}
SCORES |= {"verdict": "uint8", "policy_version": "int32"}
FIGURES = ("accuracy", "wilson_95", "correct", "samples", "problems", "truncated")
"""Of an evaluation's result, what the summary has."""
OF_SHARD = {"round": "int64", "lowest_kept": "float64", "highest_kept": "float64"}


def write_report(run: RunDirectory, config: Config) -> dict[str, Any]:
    """Write `summary.json` and `report.html`, for a run in any state; returns the summary."""
    summary = summarise(run, config)
    write_json(run.summary, summary)
    render_report(summary, _records(run), collect_scores(run), run.report)
    return summary


def summarise(run: RunDirectory, config: Config) -> dict[str, Any]:
    """The figures of a run (see the module), as JSON values without NaN."""
    records = _records(run)
    provenance = _json_or_empty(run.provenance)
    starts = [record for record in records if (record["role"], record["event"]) == (TRAINER, Event.START)]
    summary = {
        "run": str(run.root),
        **_rollouts(run),
        **_training(records),
        "trained_on": _trained_on(records),
        **_heldout(run, config),
        **_evaluations(run, config),
        "tokens_per_second_by_role": _tokens_per_second(records),
        "wall_seconds_by_phase": _wall_seconds(records),
        "parity": _parity(records),
        "publishing": _publishing(records),
        "attention_backend": starts[-1].get("attention_backend") if starts else None,
        "versions": provenance.get("packages"),
        "git_commit": provenance.get("git_commit"),
        "settings": _settings(config, _selection(run)),
    }
    return _json_value(summary)


def collect_scores(run: RunDirectory) -> dict[str, np.ndarray]:
    """Scores of every judged sample of the rounds that the student sampled, in no particular order.

    Returns:
        One array [N] for each name and dtype of SCORES and OF_SHARD; `round` counts from 0, and Δ-IFD from
        `lowest_kept` to `highest_kept` is what the rule kept that judged a sample (NaN: not a band, or not recorded).
    """
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype)] for name, dtype in (SCORES | OF_SHARD).items()}
    for index, paths in enumerate(_judged_rounds(run)):
        for path in paths:
            columns, selection = _read_columns(path, SCORES)
            if GIVEN_VERSION in columns.get("policy_version", ()):  # a unit is given as a whole; it has no scores
                continue
            for name, column in columns.items():
                parts[name].append(column)
            lowest, highest = selection.get("band") or (math.nan, math.nan)
            for name, value in zip(OF_SHARD, (index, lowest, highest), strict=True):
                parts[name].append(np.full(len(columns.get("verdict", ())), value, dtype=OF_SHARD[name]))
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def _rollouts(run: RunDirectory) -> dict[str, Any]:
    scores = collect_scores(run)
    by_round = {}
    for index in itertools.count():
        responses = _responses(run, round_stage(index))
        if responses is None:
            break
        generated, _ = responses
        judged = _judged(run, round_stage(index), scores["verdict"][scores["round"] == index])
        by_round[round_stage(index)] = {"generated": generated, **judged}
    whole = _sum_of(list(by_round.values()))
    judged_rounds = sum(stage["kept"] is not None for stage in by_round.values())
    warmup = _judged(
        run,
        WARMUP_STAGE,
        np.concatenate(
            [np.zeros(0, np.uint8)]
            + [
                _read_columns(path, ("verdict",))[0].get("verdict", np.zeros(0, np.uint8))
                for path in sorted(run.stage("samples", WARMUP_STAGE).glob("unit_*.safetensors"))
            ]
        ),
    )
    responses = _responses(run, WARMUP_STAGE)
    return {
        "rollouts_generated": sum(stage["generated"] for stage in by_round.values()) if by_round else None,
        "rollouts_kept": whole["kept"],
        "rollouts_rejected": whole["rejected"],
        "rollouts_by_round": by_round or None,
        "refreshes": judged_rounds - 1 if judged_rounds else None,  # each round is of one version
        "warmup_responses": responses and sum(responses),
        "warmup_kept": warmup["kept"],
    }


def _selection(run: RunDirectory) -> dict[str, Any]:
    """The description of the selection rule that judged the newest shard of a round; {} where there is none."""
    newest_first = (path for paths in reversed(_judged_rounds(run)) for path in reversed(paths))
    return next((selection for path in newest_first if (selection := _read_columns(path, ())[1])), {})


def _judged_rounds(run: RunDirectory) -> list[list[Path]]:
    """The shards of samples of every round that has a folder for them, by unit."""
    rounds = []
    while (folder := run.stage("samples", round_stage(len(rounds)))).is_dir():
        rounds.append(sorted(folder.glob("unit_*.safetensors")))
    return rounds


def _judged(run: RunDirectory, stage: str, verdicts: np.ndarray) -> dict[str, Any]:
    """`_by_verdict` of a stage; of one whose shards were collected, from the figures that stayed."""
    figures = collected(run, "samples", stage)
    if figures is None:
        return _by_verdict(verdicts)
    counts = Counter(figures["verdicts"])
    if stage == WARMUP_STAGE:  # of whatever source
        counts.update(figures.get("given_verdicts", {}))
    return {"kept": counts.pop("kept"), "rejected": dict(counts)}


def _sum_of(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Kept and rejected of all rounds that were judged; None where none was."""
    judged = [stage for stage in stages if stage["kept"] is not None]
    if not judged:
        return {"kept": None, "rejected": None}
    reasons = sum((Counter(stage["rejected"]) for stage in judged), Counter(dict.fromkeys(judged[0]["rejected"], 0)))
    return {"kept": sum(stage["kept"] for stage in judged), "rejected": {r: reasons[r] for r in judged[0]["rejected"]}}


def _by_verdict(verdicts: np.ndarray) -> dict[str, Any]:
    """How many were kept, and rejected for each reason; None where nothing was judged yet."""
    if not len(verdicts):
        return {"kept": None, "rejected": None}
    counts = {verdict.name.lower(): int(np.sum(verdicts == verdict)) for verdict in Verdict}
    return {"kept": counts.pop("kept"), "rejected": counts}


def _responses(run: RunDirectory, stage: str) -> tuple[int, int] | None:
    """Responses of a stage, sampled and given, from a small column of its shards; None before its first one."""
    if figures := collected(run, "rollouts", stage):
        return figures["samples"], figures.get("given", 0)
    versions = []
    for path in run.stage("rollouts", stage).glob("unit_*.safetensors"):
        try:
            with contextlib.closing(ShardFile(path, "rollouts")) as shard:
                versions.append(shard["policy_version"])
        except CorruptShardError as error:
            logger.warning("left out of the report: %s (%s)", path, error)
    if not versions:
        return None
    given = int(np.sum(np.concatenate(versions) == GIVEN_VERSION))
    return sum(map(len, versions)) - given, given


def _training(records: list[Record]) -> dict[str, Any]:
    steps = distinct_steps(records)
    rounds = [step for step in steps if str(step.get("stage", "")).startswith("round_")]
    drift = _finite(rounds, StepMetric.DRIFT)
    computed = [(_number(step, StepMetric.PACKING_EFFICIENCY), _number(step, StepMetric.TOKENS)) for step in steps]
    weighed = [(share, tokens) for share, tokens in computed if share is not None and tokens]
    return {
        "rounds": len({step["stage"] for step in rounds}) if steps else None,
        "optimizer_steps": len(steps) or None,
        "trained_tokens": sum(_finite(steps, StepMetric.RESPONSE_TOKENS)) if steps else None,
        "packing_efficiency": _ratio(sum(share * n for share, n in weighed), sum(n for _, n in weighed)),
        "near_policy_kl": {"max": max(drift), "last": drift[-1]} if drift else None,
    }


def _trained_on(records: list[Record]) -> dict[str, Any] | None:
    """Samples of each stage that was trained on, and how many of them are given responses."""
    stages = (record for record in records if record["event"] == Event.STAGE)
    return {record["stage"]: {"samples": record["samples"], "given": record["given"]} for record in stages} or None


def _heldout(run: RunDirectory, config: Config) -> dict[str, Any]:
    """Held-out KL by version, and at the three points a reader asks for."""
    plan = make_plan(config, train_prompts=1, heldout_prompts=1)
    files = map(_json_or_empty, run.evaluations.glob("v*.json"))
    evaluations = [entry for entry in files if "version" in entry]
    by_version = {entry["version"]: entry for entry in sorted(evaluations, key=lambda entry: entry["version"])}
    kl = {version: _number(entry, "heldout_kl") for version, entry in by_version.items()}
    agreement = {str(version): _number(entry, "top1_agreement") for version, entry in by_version.items()}
    before, start, after = kl.get(0), kl.get(plan.first_round_version), kl.get(plan.final_version)
    return {
        "heldout_kl_before": before,
        "heldout_kl_after_warmup": start if plan.first_round_version else None,
        "heldout_kl_after": after,
        "heldout_kl_by_version": {str(version): value for version, value in kl.items()} or None,
        "heldout_top1_agreement_by_version": agreement or None,
        "heldout_kl_reduction": {
            "whole_run": _reduction(before, after),
            "rounds": _reduction(start, after) if config.rounds.count else None,
        },
    }


def _evaluations(run: RunDirectory, config: Config) -> dict[str, Any]:
    """What versions scored in every evaluation, those included that the configuration does not name any more."""
    names = [one.name for one in config.evaluation]
    names += sorted({path.name for path in run.evaluations.glob("*/") if path.is_dir()} - set(names))
    results = {name: found for name in names if (found := results_of(run, name))}
    versions = published_versions(run)
    scored = {by: found for by in (*results, HELDOUT_KL) if (found := scores(run, by, versions))}
    return {
        "evaluation": {
            name: {_version_name(version): {key: entry.get(key) for key in FIGURES} for version, entry in of.items()}
            for name, of in results.items()
        }
        or None,
        "best_version": {by: best_of(of_versions, by) for by, of_versions in scored.items()} or None,
        "student_version": _json_or_empty(run.handed_over).get("version"),
    }


def _version_name(version: int) -> str:
    return TEACHER if version == TEACHER_VERSION else str(version)


def _tokens_per_second(records: list[Record]) -> dict[str, float | None] | None:
    """Tokens a second of one busy worker of each role; restarts and redone work only add to the average."""
    tokens: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for record in records:
        if record["event"] in (Event.UNIT, Event.STEP):
            keys = (StepMetric.TOKENS, "tokens", "response_tokens")
            tokens[record["role"]] += next((n for key in keys if (n := _number(record, key)) is not None), 0.0)
            seconds[record["role"]] += _busy_seconds(record)
    return {role: _ratio(tokens[role], seconds[role]) for role in sorted(tokens)} or None


def _wall_seconds(records: list[Record]) -> dict[str, Any] | None:
    """Busy seconds by role and stage (or event, where a record has no stage), and the run's span."""
    if not records:
        return None
    busy: dict[str, Any] = defaultdict(lambda: defaultdict(float))
    for record in records:
        if seconds := _busy_seconds(record):
            busy[record["role"]][record.get("stage") or record.get("name") or record["event"]] += seconds
    begin = min(span[0] if (span := busy_span(record)) else record["time"] for record in records)
    return {**{role: dict(stages) for role, stages in busy.items()}, "total": records[-1]["time"] - begin}


def _parity(records: list[Record]) -> dict[str, Any] | None:
    """Worst parity of any sidecar with the trainer, on starting with a version or moving to it: |Δ log p|, nats."""
    worst: dict[int, dict[str, float]] = defaultdict(dict)
    for record in (record for record in records if "version" in record):
        for name in ("mean", "max"):
            if (value := _number(record, f"parity_{name}")) is not None:
                worst[record["version"]][name] = max(value, worst[record["version"]].get(name, 0.0))
    return {str(version): worst[version] for version in sorted(worst)} or None


def _publishing(records: list[Record]) -> dict[str, Any] | None:
    """What publishing each version cost; a version is published once."""
    keys = ("bytes", "seconds", "stall_seconds")
    published = (record for record in records if record["event"] == Event.PUBLISH and "version" in record)
    return {str(record["version"]): {key: _number(record, key) for key in keys} for record in published} or None


def _settings(config: Config, selection: dict[str, Any]) -> dict[str, Any]:
    rule = selection.get("rule", config.selection.rule)
    bounds = selection.get("like", selection)  # a random drop is of the size of another rule's
    return {
        "teacher": config.models.teacher,
        "student": config.models.student,
        "dtype": config.models.dtype,
        "dtype_reason": config.models.dtype_reason,
        "seed": config.seed,
        "warmup_source": config.warmup.source,
        "warmup_kd_lambda": config.warmup.kd_lambda,
        "warmup_samples_per_prompt": config.warmup.samples_per_prompt,
        "warmup_prompts": config.warmup.prompts,
        "warmup_epochs": config.warmup.epochs,
        **{f"rounds_{name}": value for name, value in config.rounds.model_dump().items()},
        "max_new_tokens": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "rule": rule,
        "form": None if rule == "none" else bounds.get("form", config.selection.form),
        "tau": None if rule == "none" else bounds.get("tau", config.selection.tau),
        "top_k": config.annotator.top_k,
        "tail": config.training.tail,
        "kd_lambda": config.training.kd_lambda,
        "lr": config.training.lr,
        "sequence_length": config.training.sequence_length,
        "global_batch_size": config.training.global_batch_size,
        "trainer_ranks": config.training.world_size,
        "kl_limit": config.near_policy.kl_limit,
    }


def _records(run: RunDirectory) -> list[Record]:
    return [record for record in read_metrics(run.metrics_folder) if "role" in record and "event" in record]


def _read_columns(path: Path, names: Iterable[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A few columns of a shard of samples without reading the rest (the annotation is most of it), and its
    selection rule's description; both empty if it is not readable.

    The checksum covers the whole file and is not looked at: a report never renames what others work on.
    """
    try:
        with contextlib.closing(ShardFile(path, "samples")) as shard:
            return {name: shard[name] for name in names}, shard.metadata.get("selection", {})
    except CorruptShardError as error:
        logger.warning("left out of the report: %s", error)
        return {}, {}


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _number(record: Record, key: str) -> float | None:
    """A finite number of a record, or None."""
    value = record.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _finite(records: Iterable[Record], key: str) -> list[float]:
    return [value for record in records if (value := _number(record, key)) is not None]


def _busy_seconds(record: Record) -> float:
    """How long its role did nothing else."""
    span = busy_span(record)
    return span[1] - span[0] if span else 0.0


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _reduction(before: float | None, after: float | None) -> float | None:
    """Fraction of `before` that is gone."""
    return 1.0 - after / before if before and after is not None else None


def _json_value(value: Any) -> Any:
    """The same value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _json_value(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
