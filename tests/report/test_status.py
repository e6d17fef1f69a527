"""`npd status`: signs of life, and how a run stands in every state it can be found in."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from inputs import Inputs
from shard_factory import make_shard
from signs import leave_sign
from supervised import wait_until

from megatron_npd.buffer.leases import lease
from megatron_npd.buffer.shards import read_or_quarantine
from megatron_npd.cli import main
from megatron_npd.errors import UserError
from megatron_npd.files import write_atomically, write_json
from megatron_npd.prepare.prepare import prepare
from megatron_npd.process import activity
from megatron_npd.process.activity import doing, waiting
from megatron_npd.process.durations import duration
from megatron_npd.process.heartbeat import Heartbeat, Sign, clock_oddity, read_signs
from megatron_npd.process.metrics import Metrics
from megatron_npd.process.waiting import explained, turn, wait_for
from megatron_npd.report.status import status
from megatron_npd.report.status_text import as_text
from megatron_npd.run_directory import CHECKPOINT_STATE, LATEST_CHECKPOINT, RunDirectory
from megatron_npd.schema import Event
from megatron_npd.supervise.exclusive import only_supervisor
from megatron_npd.supervise.journal import Journal
from megatron_npd.supervise.leftovers import remove_dead_signs, remove_unfinished

ELSEWHERE = "another-host"


def wait_until_beat(run: RunDirectory, what: str) -> Sign:
    """The first sign of life that says so."""
    until = time.monotonic() + 10
    while True:
        for sign in read_signs(run):
            if sign.what == what:
                return sign
        assert time.monotonic() < until, read_signs(run)
        time.sleep(0.01)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_activities_nest_and_count() -> None:
    before, count = activity.current(), activity.changes()
    with doing("one"):
        outer = activity.current()
        with waiting("two"):
            assert (activity.current().what, activity.current().state) == ("two", "waiting")
        assert activity.current() is outer
        activity.progress()
    assert activity.current() is before
    assert activity.changes() == count + 5
    with pytest.raises(KeyError), doing("what fails"):
        raise KeyError
    assert activity.current() is before


def test_a_process_shows_what_it_does(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with Heartbeat(run, "trainer", rank=1, beat_seconds=0.02), doing("step 3"):
        sign = wait_until_beat(run, "step 3")
        assert (sign.role, sign.rank, sign.name, sign.pid) == ("trainer", 1, "trainer.rank1", os.getpid())
        assert sign.host == socket.gethostname()
        assert abs(sign.since - time.time()) < 5 and abs(sign.beat - time.time()) < 5
        with waiting("a version"):
            assert wait_until_beat(run, "a version").state == "waiting"
        again = wait_until_beat(run, "step 3")
        assert again.since == sign.since and again.changes > sign.changes
        wait_until(lambda: wait_until_beat(run, "step 3").beat > again.beat)
    assert read_signs(run) == []
    assert list(run.status_folder.iterdir()) == []


def test_a_sign_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDirectory(tmp_path)
    run.status_folder.write_text("in the way")
    with Heartbeat(run, "trainer", beat_seconds=0.02):
        time.sleep(0.2)
        assert read_signs(run) == []
        run.status_folder.unlink()
        wait_until_beat(run, activity.current().what)
    assert caplog.text.count("no sign of life can be given") == 1


def test_what_is_waited_for_is_said_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    looks = iter([None, None, 7])
    seen = []

    def look() -> int | None:
        seen.append(activity.current().state)
        return next(looks)

    assert wait_for("the seventh", look, 0.001) == 7
    assert seen == ["working", "waiting", "waiting"]
    assert caplog.messages == ["waiting for the seventh"]
    assert wait_for("what is there", lambda: 1) == 1
    assert caplog.messages == ["waiting for the seventh"]
    with explained("nobody") as still:
        still()
    assert caplog.messages[1:] == ["waiting for nobody"]


@pytest.mark.heavy
def test_waiting_for_ones_turn_is_waiting(tmp_path: Path) -> None:
    lock, states = tmp_path / "turn", []
    with turn(lock):
        other = subprocess.Popen(
            [sys.executable, "-c", _TAKE_A_TURN, str(lock)], stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        assert other.stdout is not None
        states += [other.stdout.readline().strip()]
    states += [other.stdout.readline().strip()]
    other.wait(10)
    assert states[0] == "waiting its turn to compute" and states[1] == "working starting"


_TAKE_A_TURN = """
import sys, threading, time
from pathlib import Path
from megatron_npd.process import activity
from megatron_npd.process.waiting import turn

def tell():
    while activity.current().state == "working":
        time.sleep(0.01)
    print(activity.current().state, activity.current().what, flush=True)

threading.Thread(target=tell, daemon=True).start()
with turn(Path(sys.argv[1])):
    print(activity.current().state, activity.current().what, flush=True)
"""


@pytest.mark.parametrize(
    ("ahead", "words"), [(0.1, None), (-4.9, None), (7.4, "7 s ahead of"), (-3600.0, "3600 s behind")]
)
def test_a_clock_that_differs_is_spoken_of(ahead: float, words: str | None) -> None:
    said = clock_oddity(ahead)
    assert (said is None) if words is None else (words in str(said) and socket.gethostname() in str(said))


def test_durations() -> None:
    spans = [0.4, 59, 60, 200, 3600, 7500, 90000, 86400 * 3]
    assert [duration(span) for span in spans] == [
        "0 s", "59 s", "1 min", "3 min 20 s", "1 h", "2 h 5 min", "1 d 1 h", "3 d",
    ]  # fmt: skip


@pytest.fixture
def prepared(inputs: Inputs) -> RunDirectory:
    inputs.set("rollout.samples_per_unit", 2)
    inputs.set("warmup.samples_per_prompt", 1)
    return prepare(inputs.config)


@pytest.fixture
def working(prepared: RunDirectory) -> Iterator[RunDirectory]:
    """A run in the middle: warm-up trained on, a round rolled out in part, one role at work, another dead."""
    run = prepared
    for unit in range(3):
        write_atomically(run.unit("rollouts", "warmup", unit), b"")
        write_atomically(run.unit("samples", "warmup", unit), b"")
    write_atomically(run.unit("rollouts", "round_0000", 0), b"")
    write_atomically(run.unit("samples", "round_0000", 1), b"corrupt")
    assert read_or_quarantine(run.unit("samples", "round_0000", 1), "samples") is None
    for version in (0, 1):
        run.version(version).mkdir(parents=True)
    checkpoint = run.checkpoints / "iter_0000007"
    progress = {"step": 7, "finished": ["warmup"], "stage": "round_0000", "stage_step": 2}
    write_json(checkpoint / CHECKPOINT_STATE, {"optimizer_steps": 7, "run": {"digest": "", "progress": progress}})
    write_atomically(run.checkpoints / LATEST_CHECKPOINT, b"iter_0000007\n")
    Metrics(run.metrics("trainer"), "trainer").log("step", 9, stage="round_0000", **{"train/loss": 1.5})
    journal = Journal(run)
    for how in ("rollout exited with status 1", "rollout was ended by SIGKILL"):
        journal.record(Event.FAILURE, of="rollout", how=how, status=1, restart_in=1.0)
        journal.record(Event.RESTART, of="rollout")
    leave_sign(run, "rollout", ELSEWHERE, 4711, age=600, what="generating round_0000, unit 2 of 3")
    with (
        Heartbeat(run, "annotator", beat_seconds=0.05),
        lease(run.lease("samples", "round_0000", 2), 300),
        waiting("rollouts to annotate"),
    ):
        wait_until_beat(run, "rollouts to annotate")
        yield run


def test_a_run_at_work(working: RunDirectory) -> None:
    now = status(working.root)
    assert (now["state"], now["student"]) == ("running", None)
    annotator, rollout = now["processes"]
    assert (annotator["name"], annotator["state"], annotator["what"]) == (
        "annotator", "waiting", "rollouts to annotate",
    )  # fmt: skip
    assert annotator["alive"] and annotator["for"] < 10 and annotator["heard_of"] < 10
    assert not rollout["alive"] and 590 < rollout["heard_of"] < 700
    stages = {stage["name"]: stage for stage in now["stages"]}
    assert [stages[name]["units"] for name in ("heldout", "warmup", "round_0000", "round_0001")] == [2, 3, 3, 3]
    assert (stages["warmup"]["state"], stages["warmup"]["annotated"]) == ("trained", 3)
    assert (stages["round_0000"]["state"], stages["round_0001"]["state"]) == ("training", "to_come")
    assert (stages["round_0000"]["rolled_out"], stages["round_0000"]["annotated"]) == (1, 0)
    [held] = stages["round_0000"]["leases"]
    assert (held["kind"], held["unit"], held["pid"]) == ("samples", 2, os.getpid()) and held["age"] < 10
    assert now["versions"] == [0, 1]
    assert (now["checkpoint"]["step"], now["checkpoint"]["stage_step"]) == (7, 2)
    assert now["trainer"] == {"step": 9, "stage": "round_0000", "loss": 1.5}
    assert (now["failures"], now["restarts"]) == ({"rollout": 2}, {"rollout": 2})
    assert now["last_failure"]["how"] == "rollout was ended by SIGKILL"
    assert now["quarantined"] == ["samples/round_0000/unit_000001.safetensors.quarantined"]


def test_the_same_in_words(working: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(working.root)]) == 0
    text = capsys.readouterr().out
    for words in (
        f"{working.root}: running",
        "annotator         waiting for rollouts to annotate, for",
        "rollout           no sign of life for 10 min",
        "process 4711 of another-host; was generating round_0000, unit 2 of 3",
        "round_0000        1 of 3 units rolled out, 0 annotated, being trained on",
        f"samples unit 3 is leased by process {os.getpid()} of {socket.gethostname()}",
        "2 versions published, the newest is 1",
        "iter_0000007, after step 7 (step 2 of round_0000)",
        "9 (round_0000, loss 1.5000)",
        "rollout failed 2 times and was started again 2 times",
        "quarantined       samples/round_0000/unit_000001.safetensors.quarantined",
    ):
        assert words in text
    assert main(["status", str(working.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"] == [0, 1]


def test_a_copied_run_has_nobody_at_work(working: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(working.root, tmp_path / "copy")
    now = status(tmp_path / "copy")
    assert (now["state"], now["processes"]) == ("stopped", [])
    assert now["checkpoint"]["step"] == 7
    assert "stopped; started again, it continues from here" in as_text(now)


def test_a_finished_run(working: RunDirectory) -> None:
    for path in working.status_folder.iterdir():
        if ELSEWHERE not in path.name:
            path.unlink()
    working.student.mkdir()
    now = status(working.root)
    assert (now["state"], now["student"]) == ("finished", str(working.student))


def test_a_broken_run(working: RunDirectory) -> None:
    shutil.rmtree(working.root / "prompts")
    write_atomically(working.checkpoints / LATEST_CHECKPOINT, b"iter_0000099\n")
    working.metrics("supervisor").write_text('{"event": "fail')
    working.metrics("trainer").write_text("{")
    write_atomically(working.status("trainer", 0, "x", 1), b"{")
    write_atomically(working.lease("samples", "round_0000", 2), b"{")
    shutil.rmtree(working.weights)
    now = status(working.root)
    assert [stage["units"] for stage in now["stages"]] == [None] * 4
    assert [stage["rolled_out"] for stage in now["stages"]] == [0, 3, 1, 0]
    assert (now["checkpoint"], now["trainer"], now["versions"], now["failures"]) == (None, None, [], {})
    assert "1 of ? units rolled out" in as_text(now)
    with pytest.raises(UserError, match="not a run directory"):
        status(working.root / "weights")


def test_it_is_quick_and_needs_no_torch(prepared: RunDirectory) -> None:
    code = "import sys; from megatron_npd.cli import main; main(['status', sys.argv[1]])"
    code += "; assert 'torch' not in sys.modules"
    best = 60.0
    for _ in range(3):  # this machine may have other things to do
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", code, str(prepared.root)], check=True, capture_output=True)
        best = min(best, time.monotonic() - started)
    assert best < 5, "well under a second on an idle machine"


def test_dead_processes_signs_are_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    gone = leave_sign(run, "trainer", socket.gethostname(), dead_pid())
    here = leave_sign(run, "trainer", socket.gethostname(), os.getpid(), age=1000)
    elsewhere = leave_sign(run, "trainer", ELSEWHERE, 1, age=1000)
    long_gone = leave_sign(run, "annotator", ELSEWHERE, 2, age=4000)
    remove_dead_signs(run)
    assert [path.exists() for path in (gone, here, elsewhere, long_gone)] == [False, True, True, False]


def test_what_was_being_written_is_removed_after_an_hour(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    old, long_ago = [], time.time() - 4000
    for name in (
        "rollouts/warmup/.unit_000001.safetensors.abc.tmp",
        "weights/.staging-v000003-1/model",
        ".a.json.1.tmp",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
        old.append(path)
    fresh = [tmp_path / "weights/.staging-v000004-2/model", tmp_path / "samples/warmup/.unit_000002.safetensors.x.tmp"]
    for path in fresh:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("being written")
    kept = [tmp_path / "rollouts/warmup/unit_000000.safetensors", tmp_path / ".hidden", tmp_path / "a.tmp"]
    for path in kept:
        path.write_text("whole")
    for path in [*old, *kept, old[1].parent, fresh[0].parent]:
        os.utime(path, (long_ago, long_ago))
    assert remove_unfinished(run) == 3
    assert not any(path.exists() for path in old) and not old[1].parent.exists()
    assert all(path.exists() for path in [*fresh, *kept])


def keep_alive(path: Path, end: threading.Event) -> None:
    while not end.wait(0.05):
        os.utime(path)


@pytest.mark.heavy
def test_a_supervisor_of_another_host_is_refused_while_it_lives(tmp_path: Path) -> None:
    run, end = RunDirectory(tmp_path), threading.Event()
    path = leave_sign(run, "supervisor", ELSEWHERE, 4711)
    other = threading.Thread(target=keep_alive, args=(path, end))
    other.start()
    try:
        with pytest.raises(UserError, match="process 4711 of another-host already runs it"), only_supervisor(run, 5.0):
            pass
    finally:
        end.set()
        other.join()
    assert [sign.host for sign in read_signs(run)] == [ELSEWHERE], "the refused one left no sign"
    with only_supervisor(run, listen_seconds=0.5):  # killed since
        assert {sign.host for sign in read_signs(run)} == {ELSEWHERE, socket.gethostname()}
        started = time.monotonic()
        with pytest.raises(UserError, match=f"process {os.getpid()} of .* already runs it"), only_supervisor(run):
            pass
        assert time.monotonic() - started < 1
    leave_sign(run, "supervisor", ELSEWHERE, 4711, age=60)
    started = time.monotonic()
    with only_supervisor(run):  # known to be dead: nobody listens for it
        assert time.monotonic() - started < 2


def test_a_shard_that_is_written_is_no_leftover(tmp_path: Path) -> None:
    """The names removed are those that writers give up when they are done."""
    from megatron_npd.buffer.shards import write_shard

    write_shard(tmp_path / "unit", make_shard("rollouts"))
    assert [path.name for path in tmp_path.iterdir()] == ["unit"]
