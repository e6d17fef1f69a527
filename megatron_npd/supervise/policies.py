"""One sidecar that samples for both policies in turn, so that on a cluster teacher and student can have the same GPUs.

The teacher's engine comes first: its answers to the held-out prompts and of the warm-up are needed before anything
else. Each policy is a process of its own: when it ends, all its GPU memory is free again. Should work come back to the
teacher (a corrupt shard was set aside), the student's process is stopped for it: otherwise it might wait for a version
that the trainer cannot make without that shard.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_npd.buffer.evaluations import open_exams
from megatron_npd.buffer.listing import is_finished
from megatron_npd.buffer.plan import Plan, plan_of
from megatron_npd.config import Config
from megatron_npd.process.parent_death import die_with
from megatron_npd.roles import ROLLOUT, STUDENT, TEACHER
from megatron_npd.run_directory import RunDirectory
from megatron_npd.supervise.children import npd

LOOK_SECONDS = 5.0
POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


def sample_both(config: Config) -> int:
    """Sample all that either policy has to sample in this run; returns the status of a process that failed, or 0."""
    run = RunDirectory(Path(config.run_directory))
    plan = plan_of(run, config)
    while (policy := next_policy(run, plan)) is not None:
        with _sidecar(run, policy) as process:
            logger.info("sampling with the %s: process %d", policy, process.pid)
            look = time.monotonic() + LOOK_SECONDS
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if policy == STUDENT and time.monotonic() > look:
                    look = time.monotonic() + LOOK_SECONDS
                    if next_policy(run, plan) == TEACHER:
                        logger.info("there is work for the teacher again")
                        break
            else:
                if process.returncode:
                    return process.returncode if process.returncode > 0 else 128 - process.returncode
    return 0


def next_policy(run: RunDirectory, plan: Plan) -> str | None:
    """Whose responses are missing, the teacher's first; None if none are. Answers of evaluations are the student's."""
    for policy, stages in ((TEACHER, plan.teacher_stages), (STUDENT, plan.round_stages)):
        if not all(is_finished(run, "rollouts", stage) for stage in stages):
            return policy
    return STUDENT if open_exams(run, plan) else None


@contextlib.contextmanager
def _sidecar(run: RunDirectory, policy: str) -> Iterator[subprocess.Popen[bytes]]:
    """A sidecar for one policy; asked to stop, and waited for, where it is left before it has ended."""
    command = npd(ROLLOUT, str(run.config.resolve()), "--policy", policy)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=functools.partial(die_with, os.getpid()))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
