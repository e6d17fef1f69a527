"""The last words of `npd run`: the report is written, and its chief figures are said."""

from __future__ import annotations

from collections.abc import Callable

from megatron_npd.config import Config
from megatron_npd.process import activity
from megatron_npd.report.summary import write_report
from megatron_npd.roles import TEACHER
from megatron_npd.run_directory import RunDirectory
from megatron_npd.tasks.intervals import in_words


def conclude(run: RunDirectory, config: Config, say: Callable[[str], None]) -> None:
    """Write the report of a finished run and `say`, line by line, what became of it."""
    with activity.doing("writing the report"):
        summary = write_report(run, config)
    before, after = summary.get("heldout_kl_before"), summary.get("heldout_kl_after")
    if before is not None and after is not None:
        say(f"held-out KL(teacher || student): {before:.4f} before, {after:.4f} after, nats a token")
    for name, results in (summary.get("evaluation") or {}).items():
        versions = {version: result for version, result in results.items() if version != TEACHER}
        for version in list(versions)[:: max(len(versions) - 1, 1)]:  # the first and the last
            say(f"{name} by version {version}: {in_words(versions[version])}")
    what, there, kept = "responses", summary.get("rollouts_generated"), summary.get("rollouts_kept")
    if there is None:  # no rounds: the warm-up is all
        what, there, kept = "responses of the warm-up", summary.get("warmup_responses"), summary.get("warmup_kept")
    say(f"{there} {what}, {kept} kept, {summary.get('optimizer_steps')} optimizer steps")
    for stage, trained in (summary.get("trained_on") or {}).items():
        if trained["given"]:
            say(f"{stage}: trained on {trained['samples']} samples, {trained['given']} of them given")
    chosen = f", version {summary['student_version']}, the best by {config.export.by}" if config.export.by else ""
    say(f"student: {run.student if run.student.is_dir() else run.weights}{chosen}")
    say(f"report:  {run.report}")
