"""What every finished run of the examples has to show."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_npd.config import load_config
from megatron_npd.run_directory import RunDirectory
from megatron_npd.versions.manifest import published_versions


def check_finished(folder: Path) -> None:
    """The run published every version of its plan, kept and rejected samples, and trained ten epochs."""
    run = RunDirectory(folder)
    summary = json.loads(run.summary.read_text())
    config = load_config(run.config)
    versions = 3 + (config.warmup.samples_per_prompt > 0)
    assert published_versions(run) == list(range(versions))
    assert summary["rounds"] == 2 and summary["refreshes"] == 1
    assert summary["rollouts_kept"] > 0
    assert run.student.is_dir() and run.report.is_file()
