"""`npd status RUN`: who does what, or waits for what, since when; how far the run is; what went wrong.

Read from the run directory alone, without torch, of a run that works, is finished, broken or copied. Ages are by the
filesystem's clock, which stamped every file: the clocks of hosts may disagree.

Keys of `status`, ages in seconds:

    run, state (running, finished or stopped), student (folder of the finished one, or None)
    processes [{name, role, rank, host, pid, state, what, for, heard_of, alive}]   for: how long it does that;
        heard_of: age of its last sign of life; alive: heard of lately
    stages [{name, units, rolled_out, annotated, state, leases [{kind, unit, host, pid, age}]}]   units: None where the
        prompts cannot be read; state: to_come, training, trained, collected (its shards are removed), or heldout
    evaluations [{name, versions [wanted ones], answered {version: accuracy}}]
    versions, checkpoint {name, step, stage, stage_step, age}, trainer {step, stage, loss}   trainer: its last step
    failures {role: n}, restarts {role: n}, last_failure {of, how, age, restart_in}
    quarantined [files that were corrupt and were set aside]
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_npd.buffer.evaluations import scores
from megatron_npd.buffer.leases import filesystem_time
from megatron_npd.buffer.listing import finished_units
from megatron_npd.buffer.plan import Stage, make_plan, plan_of
from megatron_npd.buffer.retention import KINDS, collected
from megatron_npd.config import Config, load_config
from megatron_npd.errors import UserError
from megatron_npd.files import read_json
from megatron_npd.process.heartbeat import QUIET_SECONDS, Sign, read_signs
from megatron_npd.roles import TRAINER
from megatron_npd.run_directory import HELDOUT_STAGE, RunDirectory
from megatron_npd.schema import Event, StepMetric
from megatron_npd.supervise.journal import read_journal
from megatron_npd.supervise.progress import last_record
from megatron_npd.supervise.resume_point import ResumePoint, resume_point
from megatron_npd.versions.manifest import published_versions


def status(run_dir: str | Path) -> dict[str, Any]:
    """How a run stands (see the module), as JSON values.

    Raises:
        UserError: not a run directory, or its config.toml cannot be used.
    """
    run = RunDirectory(Path(run_dir))
    if not run.config.is_file():
        raise UserError(f"{run_dir}: not a run directory: it has no {run.config.name}")
    config, now, point = load_config(run.config), _now(run), resume_point(run)
    processes = [_process(sign, now) for sign in read_signs(run)]
    has_student, evaluations = run.student.is_dir(), _evaluations(run, config)
    answered = all(len(one["answered"]) == len(one["versions"]) for one in evaluations)
    idle = "finished" if has_student and answered else "stopped"
    return {
        "run": str(run.root),
        "state": "running" if any(process["alive"] for process in processes) else idle,
        "student": str(run.student) if has_student else None,
        "processes": processes,
        "stages": _stages(run, config, point, now),
        "evaluations": evaluations,
        "versions": published_versions(run),
        "checkpoint": point and _checkpoint(point, now),
        TRAINER: _last_step(run),
        **_failures(run),
        "quarantined": sorted(str(path.relative_to(run.root)) for path in _quarantined(run)),
    }


def _now(run: RunDirectory) -> float:
    try:
        return filesystem_time(run.root)
    except OSError:  # a copy that may only be read
        return time.time()


def _process(sign: Sign, now: float) -> dict[str, Any]:
    return {
        "name": sign.name,
        "role": sign.role,
        "rank": sign.rank,
        "host": sign.host,
        "pid": sign.pid,
        "state": sign.state,
        "what": sign.what,
        "for": max(now - sign.since, 0.0),
        "heard_of": max(now - sign.beat, 0.0),
        "alive": now - sign.beat < QUIET_SECONDS,
    }


def _stages(run: RunDirectory, config: Config, point: ResumePoint | None, now: float) -> list[dict[str, Any]]:
    try:
        plan, is_known = plan_of(run, config), True
    except (OSError, ValueError):  # the names of its stages are known all the same
        plan, is_known = make_plan(config, 1, 1), False
    return [
        {
            "name": stage.name,
            "units": stage.units if is_known else None,
            "rolled_out": len(finished_units(run, "rollouts", stage)),
            "annotated": len(finished_units(run, "samples", stage)),
            "state": _stage_state(run, stage, point),
            "leases": list(_leases(run, stage, now)),
        }
        for stage in plan.stages.values()
    ]


def _evaluations(run: RunDirectory, config: Config) -> list[dict[str, Any]]:
    asked = make_plan(config, 1, 1).asked
    return [
        {
            "name": name,
            "versions": sorted(versions),
            "answered": {str(version): accuracy for version, accuracy in scores(run, name, sorted(versions)).items()},
        }
        for name, versions in asked.items()
    ]


def _stage_state(run: RunDirectory, stage: Stage, point: ResumePoint | None) -> str:
    if stage.name == HELDOUT_STAGE:
        return "heldout"
    if collected(run, "samples", stage.name):
        return "collected"
    if point and stage.name in point.finished:
        return "trained"
    return "training" if point and stage.name == point.stage else "to_come"


def _leases(run: RunDirectory, stage: Stage, now: float) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        for path in sorted(run.stage_leases(kind, stage.name).glob("unit_*.json")):
            try:
                holder, age = read_json(path), now - path.stat().st_mtime
                yield {
                    "kind": kind,
                    "unit": int(path.stem.removeprefix("unit_")),
                    "host": holder["host"],
                    "pid": holder["pid"],
                    "age": max(age, 0.0),
                }
            except (OSError, ValueError, KeyError, TypeError):  # just returned, or just being taken
                continue


def _checkpoint(point: ResumePoint, now: float) -> dict[str, Any]:
    return {
        "name": point.folder.name,
        "step": point.step,
        "stage": point.stage,
        "stage_step": point.stage_step,
        "age": max(now - point.written, 0.0),
    }


def _last_step(run: RunDirectory) -> dict[str, Any] | None:
    record = last_record(run.metrics(TRAINER), Event.STEP)
    return record and {"step": record.get("step"), "stage": record.get("stage"), "loss": record.get(StepMetric.LOSS)}


def _failures(run: RunDirectory) -> dict[str, Any]:
    journal = read_journal(run)
    counts = {
        event: Counter(str(record.get("of")) for record in journal if record["event"] == event)
        for event in (Event.FAILURE, Event.RESTART)
    }
    last = next((record for record in reversed(journal) if record["event"] == Event.FAILURE), None)
    if last is not None:  # of this supervisor's host, whose clock wrote it
        age = max(time.time() - last.get("time", 0.0), 0.0)
        last = {key: last.get(key) for key in ("of", "how", "restart_in")} | {"age": age}
    return {"failures": dict(counts[Event.FAILURE]), "restarts": dict(counts[Event.RESTART]), "last_failure": last}


def _quarantined(run: RunDirectory) -> Iterator[Path]:
    for kind in KINDS:
        yield from run.stages(kind).glob("*/*.quarantined")
