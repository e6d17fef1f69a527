"""Where a restart of the trainer would continue: its current checkpoint, as far as it can be told without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_npd.files import read_json
from megatron_npd.run_directory import CHECKPOINT_STATE, LATEST_CHECKPOINT, RunDirectory


@dataclass(frozen=True)
class ResumePoint:
    """Where the current checkpoint stands."""

    folder: Path
    step: int
    """Optimizer steps done."""
    finished: list[str]
    """Stages done."""
    stage: str | None
    """The stage under way."""
    stage_step: int
    """Its steps that are done."""
    written: float
    """When it became current, Unix seconds by the filesystem's clock."""


def resume_point(run: RunDirectory) -> ResumePoint | None:
    """What a restart of the trainer would continue from; None: from the beginning, or it cannot be told."""
    latest = run.checkpoints / LATEST_CHECKPOINT
    try:
        folder = run.checkpoints / latest.read_text().strip()
        state = read_json(folder / CHECKPOINT_STATE)
        progress = state["run"]["progress"]
        return ResumePoint(
            folder,
            int(state["optimizer_steps"]),
            list(progress["finished"]),
            progress["stage"],
            int(progress["stage_step"]),
            latest.stat().st_mtime,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
