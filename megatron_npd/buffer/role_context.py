"""What every role has of its run: configuration, directory, plan, prompts, metrics, memory, and turns at computing."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from megatron_npd.buffer.plan import make_plan
from megatron_npd.config import Config
from megatron_npd.data.prompts import HELDOUT, SPLITS, TRAIN, PromptSet, load_prompt_set
from megatron_npd.hardware.device import device_peak_bytes
from megatron_npd.process.memory import PeakMemory, steady_heap
from megatron_npd.process.metrics import Metrics, metrics_file, process_seconds
from megatron_npd.process.waiting import turn, turn_lock, wait_for
from megatron_npd.run_directory import RunDirectory


class RoleContext:
    """Made first thing by a process that begins to work in a prepared run directory. It logs nothing before
    `open_metrics`, which one rank of a role calls.

    Attributes:
        prompts: split -> its tokenised prompts.
        memory: watches this process from now on.
        started: by `time.monotonic`, when this was made; before it the process imported for `import_seconds`.
    """

    def __init__(self, config: Config, role: str):
        self.started, self.import_seconds = time.monotonic(), process_seconds()
        steady_heap()
        self.memory = PeakMemory(device_peak_bytes)
        self.config, self.role = config, role
        self.run = RunDirectory(Path(config.run_directory))
        self.prompts = {split: _wait_for_prompts(config, self.run.prompts(split)) for split in SPLITS}
        train, heldout = self.prompts[TRAIN], self.prompts[HELDOUT]
        self.plan = make_plan(config, len(train), len(heldout), train.answered)
        self._metrics: Metrics | None = None
        self._turn_lock = turn_lock(config, self.run)

    def open_metrics(self, file: Path | None = None, tensorboard: Path | None = None) -> None:
        """Write this process's records from now on.

        Args:
            file: None: one of this process's own, where a role has several that write.
            tensorboard: folder for scalars as well.
        """
        self._metrics = Metrics(file or metrics_file(self.run, self.role), self.role, tensorboard)

    def log(self, event: str, step: int | None = None, **values: object) -> None:
        """One metrics record, if this process writes any."""
        if self._metrics:
            self._metrics.log(event, step, **values)

    def turn(self, takes_it: bool = True) -> contextlib.AbstractContextManager[None]:
        """Compute while no other role of this machine does, where roles take turns.

        `takes_it` False: for a rank that computes while another holds the turn for both.
        """
        return turn(self._turn_lock if takes_it else None)


def _wait_for_prompts(config: Config, folder: Path) -> PromptSet:
    """A prompt set, once its last file is there."""
    names = folder / "names.txt"
    wait_for(f"tokenised prompts in {folder}", lambda: names.is_file() or None, config.launch.poll_seconds)
    return load_prompt_set(folder)
