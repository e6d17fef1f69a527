"""Supervised steps of a job: which of them a run can do without, and how srun is told to stop its tasks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from inputs import Inputs
from supervised import SLEEP, python, role, run, wait_until

from megatron_npd.buffer.plan import make_plan
from megatron_npd.errors import NODE_LOST_STATUS, USAGE_STATUS
from megatron_npd.files import write_atomically, write_json
from megatron_npd.process.heartbeat import Heartbeat
from megatron_npd.process.logs import first_failed_task
from megatron_npd.run_directory import RunDirectory
from megatron_npd.slurm.srun_steps import SrunStep, roles_of_steps
from megatron_npd.supervise.children import Child, stop
from megatron_npd.supervise.leftovers import return_stale_leases
from megatron_npd.supervise.role_work import Role
from megatron_npd.supervise.watching import HangWatch

pytestmark = pytest.mark.slow


def part(folder: Path, name: str, code: str, is_done: Callable[[], bool], lost: bool = False) -> Role:
    """One of several roles of a kind."""
    return replace(role(folder, name, code, is_done), kind=name.split(".")[0], is_lost=lambda: lost)


def test_a_run_does_without_a_node_where_others_do_the_work(tmp_path: Path) -> None:
    done = tmp_path / "done"
    lost = part(tmp_path, "rollout.node1", "raise SystemExit(1)", done.exists, lost=True)
    works = part(tmp_path, "rollout.node2", f"import time; time.sleep(1); open({str(done)!r}, 'w')", done.exists)
    status, output = run(tmp_path, [lost, works], max_restarts=5)
    assert status == 0
    assert "rollout.node1 is given up, its node is no longer part of this job; the run goes on without it" in output
    assert output.count("starting rollout.node1") == 1


def test_a_run_that_loses_the_last_of_a_kind_must_go_on_elsewhere(tmp_path: Path) -> None:
    lost = part(tmp_path, "rollout.node1", "raise SystemExit(1)", lambda: False, lost=True)
    other = part(tmp_path, "annotator.node2", SLEEP, lambda: False)
    status, output = run(tmp_path, [lost, other], max_restarts=5)
    assert status == NODE_LOST_STATUS
    assert "rollout.node1 has lost its node" in output


def test_losing_both_of_two_nodes_is_losing_the_last(tmp_path: Path) -> None:
    late = "import time; time.sleep(0.5); raise SystemExit(1)"
    nodes = [
        part(tmp_path, f"rollout.node{i}", late if i else "raise SystemExit(1)", lambda: False, True) for i in (0, 1)
    ]
    status, output = run(tmp_path, nodes, max_restarts=5)
    assert status == NODE_LOST_STATUS
    assert "rollout.node0 is given up" in output and "rollout.node1 has lost its node" in output


def test_a_lost_node_that_nobody_needs_any_more_is_no_loss(tmp_path: Path) -> None:
    done = tmp_path / "done"
    lost = part(tmp_path, "rollout.node1", f"open({str(done)!r}, 'w'); raise SystemExit(1)", done.exists, lost=True)
    assert run(tmp_path, [lost], max_restarts=5)[0] == 0


def test_one_that_keeps_failing_is_given_up_like_a_lost_one(tmp_path: Path) -> None:
    done = tmp_path / "done"
    broken = part(tmp_path, "rollout.node1", "raise SystemExit(1)", done.exists)
    works = part(tmp_path, "rollout.node2", f"import time; time.sleep(2); open({str(done)!r}, 'w')", done.exists)
    status, output = run(tmp_path, [broken, works], max_restarts=1)
    assert status == 0
    assert "rollout.node1 is given up, it keeps failing" in output
    assert output.count("starting rollout.node1 again") == 2  # announced, then done


def test_what_one_refuses_all_refuse(tmp_path: Path) -> None:
    picky = part(tmp_path, "rollout.node1", "raise SystemExit(2)", lambda: False)
    assert run(tmp_path, [picky, part(tmp_path, "rollout.node2", SLEEP, lambda: False)])[0] == USAGE_STATUS


RECEIVER = """
import signal, sys, time
def note(number, frame):
    print(signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM or "polite" in sys.argv: sys.exit(7)
for number in (signal.SIGUSR1, signal.SIGTERM): signal.signal(number, note)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("manner", "signals"), [("polite", ["SIGUSR1"]), ("deaf", ["SIGUSR1", "SIGTERM"])])
def test_srun_passes_sigusr1_on_and_kills_its_tasks_at_sigterm(tmp_path: Path, manner: str, signals: list[str]) -> None:
    """So that is what it is sent; SIGKILL would leave its tasks running (test_slurm has the real one)."""
    command = replace(python(tmp_path, manner, RECEIVER), is_srun=True)
    child = Child(replace(command, argv=[*command.argv, manner]))
    wait_until(lambda: "ready" in command.log.read_text())
    killed = stop([child], grace_seconds=0.3)
    assert [c.command.name for c in killed] == ([] if manner == "polite" else ["deaf"])
    assert child.poll() == 7
    assert command.log.read_text().split() == ["ready", *signals]


def test_every_step_is_wanted_from_the_beginning(inputs: Inputs) -> None:
    """Also where roles take turns, as on three nodes that are one machine: a sidecar samples for the teacher as well,
    so it must not wait until the teacher's responses are there."""
    inputs.set("launch.turns", "on")
    directory, plan = RunDirectory(inputs.run), make_plan(inputs.config, 6, 3)
    steps = [SrunStep(name, ["true"]) for name in ("trainer", "annotator.node1", "rollout.node1", "rollout.node2")]
    assert all(role.is_wanted() for role in roles_of_steps(inputs.config, directory, plan, steps))


def test_without_rounds_a_sidecar_is_done_when_the_teachers_work_is(inputs: Inputs) -> None:
    inputs.set("rounds.count", 0)
    inputs.set("warmup.source", "data")
    directory, plan = RunDirectory(inputs.run), make_plan(inputs.config, 6, 3)
    steps = [SrunStep(name, ["true"]) for name in ("trainer", "annotator.node1", "rollout.node1")]
    sidecar = roles_of_steps(inputs.config, directory, plan, steps)[-1]
    for done, stage in enumerate(("heldout", "warmup")):
        assert not sidecar.is_done() and sidecar.done() == done
        write_atomically(directory.unit("rollouts", stage, 0), b"")
    assert sidecar.is_done() and sidecar.done() == 2


def test_the_log_of_the_task_that_failed(tmp_path: Path) -> None:
    log = tmp_path / "trainer.srun.log"
    said = ["srun: something else", "srun: error: n1: task 3: Killed", "srun: error: n2: tasks 4-7: Terminated"]
    assert first_failed_task(log, said) == tmp_path / "trainer.rank3.log"
    assert first_failed_task(log, said[2:]) == tmp_path / "trainer.rank4.log"
    assert first_failed_task(log, said[:1]) is None


def test_leases_of_a_silent_host_are_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path)
    leases = [directory.lease("rollouts", "round_0000", unit) for unit in range(2)]
    for path, pid in zip(leases, (11, 12), strict=True):
        write_json(path, {"host": "elsewhere", "pid": pid})
    for pid, age in ((11, 3600), (12, 0)):
        path = directory.status("rollout", 0, "elsewhere", pid)
        with monkeypatch.context() as patch:
            patch.setattr("socket.gethostname", lambda: "elsewhere")
            patch.setattr("os.getpid", lambda pid=pid: pid)
            Heartbeat(directory, "rollout")._beat()
        os.utime(path, (time.time() - age, time.time() - age))
    assert return_stale_leases(directory) == 1
    assert not leases[0].exists() and leases[1].exists()


def test_a_step_hangs_where_one_of_its_processes_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    monkeypatch.setenv("NPD_STEP", "rollout.node3")
    with Heartbeat(directory, "rollout"):
        watch = HangWatch(directory, hang_seconds=0.2)
        assert watch.hanging_steps() == {}
        time.sleep(0.4)
        assert watch.hanging_steps() == {"rollout.node3": "starting"}
    time.sleep(0.3)
    assert watch.hanging_steps() == {}, "it has ended"
