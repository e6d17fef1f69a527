"""Where in the plan training stands: what a checkpoint remembers beside weights and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Position:
    """Counts of what is done. Order of samples and learning rate follow from it, so nothing else is needed."""

    step: int = 0
    """Optimizer steps of the whole run."""
    finished: list[str] = field(default_factory=list)
    """Stages that are done."""
    stage: str | None = None
    """The stage under way."""
    stage_step: int = 0
    """Its steps that are done."""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Position:
        """The position a checkpoint was saved with."""
        return cls(**state)

    def to_state(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def enter(self, stage: str) -> int:
        """Begin a stage, or go on with it; returns its steps that are done."""
        if self.stage != stage:
            self.stage, self.stage_step = stage, 0
        return self.stage_step

    def step_done(self) -> None:
        """One more optimizer step of the stage under way."""
        self.step += 1
        self.stage_step += 1

    def leave(self) -> None:
        """The stage under way is finished."""
        assert self.stage is not None
        self.finished.append(self.stage)
        self.stage, self.stage_step = None, 0
