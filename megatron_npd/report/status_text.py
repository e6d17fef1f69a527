"""`npd status RUN` for people: the dictionary of `status` as lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_npd.process.activity import WAITING
from megatron_npd.process.durations import duration
from megatron_npd.roles import TRAINER

_STATES = {"to_come": "", "heldout": "", "training": ", being trained on", "trained": ", trained on"}
_STATES["collected"] = ", trained on and removed"


def as_text(status: dict[str, Any]) -> str:
    """The lines, without a line break at the end."""
    return "\n".join(_lines(status))


def _lines(status: dict[str, Any]) -> Iterator[str]:
    end = {"finished": f": {status['student']}", "stopped": "; started again, it continues from here"}
    yield f"{status['run']}: {status['state']}{end.get(status['state'], '')}"
    for process in status["processes"]:
        yield f"  {process['name']:<18}{_activity(process)}"
    for stage in status["stages"]:
        yield f"  {stage['name']:<18}{_stage(stage)}"
        for lease in stage["leases"]:
            yield (
                f"  {'':<18}  {lease['kind']} unit {lease['unit'] + 1} is leased by process {lease['pid']} of "
                f"{lease['host']}, heard of {duration(lease['age'])} ago"
            )
    for evaluation in status["evaluations"]:
        yield f"  {evaluation['name']:<18}{_evaluation(evaluation)}"
    yield f"  {'weights':<18}{_versions(status['versions'])}"
    yield f"  {'checkpoint':<18}{_checkpoint(status['checkpoint'])}"
    if step := status[TRAINER]:
        loss = f", loss {step['loss']:.4f}" if isinstance(step["loss"], float) else ""
        yield f"  {'last step':<18}{step['step']} ({step['stage']}{loss})"
    yield from _trouble(status)


def _activity(process: dict[str, Any]) -> str:
    words = ("waiting for " if process["state"] == WAITING else "") + process["what"]
    if process["alive"]:
        return f"{words}, for {duration(process['for'])}"
    who = f"process {process['pid']} of {process['host']}"
    return f"no sign of life for {duration(process['heard_of'])} ({who}; was {words})"


def _stage(stage: dict[str, Any]) -> str:
    units = "?" if stage["units"] is None else stage["units"]
    annotated = "" if stage["state"] == "heldout" else f", {stage['annotated']} annotated"
    return f"{stage['rolled_out']} of {units} units rolled out{annotated}{_STATES[stage['state']]}"


def _evaluation(evaluation: dict[str, Any]) -> str:
    answered, wanted = evaluation["answered"], evaluation["versions"]
    newest = f"; {100 * list(answered.values())[-1]:.1f} % right by version {list(answered)[-1]}" if answered else ""
    return f"answered by {len(answered)} of {len(wanted)} versions{newest}"


def _versions(versions: list[int]) -> str:
    return f"{len(versions)} versions published, the newest is {versions[-1]}" if versions else "nothing published yet"


def _checkpoint(checkpoint: dict[str, Any] | None) -> str:
    if checkpoint is None:
        return "none yet"
    where = f" (step {checkpoint['stage_step']} of {checkpoint['stage']})" if checkpoint["stage"] else ""
    return f"{checkpoint['name']}, after step {checkpoint['step']}{where}, {duration(checkpoint['age'])} ago"


def _trouble(status: dict[str, Any]) -> Iterator[str]:
    for role, count in sorted(status["failures"].items()):
        restarts = status["restarts"].get(role, 0)
        yield f"  {'failures':<18}{role} failed {count} times and was started again {restarts} times"
    if last := status["last_failure"]:
        yield f"  {'last failure':<18}{duration(last['age'])} ago: {last['how']}"
    for name in status["quarantined"]:
        yield f"  {'quarantined':<18}{name}"
