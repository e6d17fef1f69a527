"""`npd rollout --policy all`: the teacher first, then the student, and the teacher again when work comes back to it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import Inputs
from supervised import alive, wait_until

from megatron_npd.buffer.plan import Plan, make_plan
from megatron_npd.prepare.prepare import prepare
from megatron_npd.run_directory import RunDirectory
from megatron_npd.supervise.policies import next_policy


@pytest.fixture
def prepared(inputs: Inputs) -> tuple[RunDirectory, Plan]:
    """A prepared run in which nothing was sampled."""
    return prepare(inputs.config), make_plan(inputs.config, 6, 3)


def sample(run: RunDirectory, plan: Plan, stage: str) -> list[Path]:
    """Put a file where each unit of a stage belongs; by their names alone is told what is left to do."""
    units = [run.unit("rollouts", stage, unit) for unit in range(plan.stages[stage].units)]
    for unit in units:
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.touch()
    return units


def test_whose_turn_it_is(prepared: tuple[RunDirectory, Plan]) -> None:
    run, plan = prepared
    assert next_policy(run, plan) == "teacher"
    (heldout,) = sample(run, plan, "heldout")
    assert next_policy(run, plan) == "student"
    sample(run, plan, "round_0000")
    assert next_policy(run, plan) == "student"
    sample(run, plan, "round_0001")
    assert next_policy(run, plan) is None
    heldout.unlink()
    assert next_policy(run, plan) == "teacher"


def test_without_rounds_the_teacher_is_all(inputs: Inputs) -> None:
    inputs.set("rounds.count", 0)
    inputs.set("warmup.samples_per_prompt", 1)
    run, plan = prepare(inputs.config), make_plan(inputs.config, 6, 3)
    assert next_policy(run, plan) == "teacher"
    for stage in ("heldout", "warmup"):
        sample(run, plan, stage)
    assert next_policy(run, plan) is None


@pytest.mark.slow
def test_the_student_makes_room_for_the_teacher(prepared: tuple[RunDirectory, Plan], tmp_path: Path) -> None:
    """The real processes; none gets so far as to start an engine."""
    run, plan = prepared
    (heldout,) = sample(run, plan, "heldout")
    log = tmp_path / "log"
    command = [sys.executable, "-m", "megatron_npd.cli", "rollout", str(run.config), "--policy", "all"]
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, stderr=stream)
    try:
        wait_until(lambda: "waiting for the first published policy version" in log.read_text(), 120)
        heldout.unlink()
        wait_until(lambda: len(sidecars(log, "teacher")) == 1, 120)
        heldout.touch()  # another sidecar has done it
        wait_until(lambda: len(sidecars(log, "student")) == 2, 120)
        first, second = sidecars(log, "student")
        assert not alive(first)
        assert alive(second)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert not alive(second)
    finally:
        process.kill()
        process.wait()
    assert "there is work for the teacher again" in log.read_text()


def sidecars(log: Path, policy: str) -> list[int]:
    """Process ids of the sidecars that were started for a policy, by the log."""
    return [int(pid) for pid in re.findall(rf"sampling with the {policy}: process (\d+)\n", log.read_text())]
