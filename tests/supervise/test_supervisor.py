"""The supervisor with real processes: what fails, stops, is killed or leaves, nothing of it stays behind."""

from __future__ import annotations

import fcntl
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from inputs import Inputs
from supervised import SLEEP, WITH_GRANDCHILD, alive, pids_in, python, role, run, wait_until

from megatron_npd.buffer.plan import make_plan
from megatron_npd.cli import main
from megatron_npd.files import write_atomically, write_json
from megatron_npd.process.logs import tail
from megatron_npd.process.metrics import Metrics, read_metrics
from megatron_npd.run_directory import RunDirectory
from megatron_npd.supervise.children import Child, Command, describe_exit, stop
from megatron_npd.supervise.console import Console
from megatron_npd.supervise.guardian import MARK, marked
from megatron_npd.supervise.journal import Journal, read_journal
from megatron_npd.supervise.leftovers import return_stale_leases
from megatron_npd.supervise.progress import Progress, last_record
from megatron_npd.supervise.role_work import Role, roles_of
from megatron_npd.supervise.shift import MAX_RETURNS

pytestmark = pytest.mark.slow


def test_done_when_every_role_is(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    worker = role(tmp_path, "worker", f"open({str(marker)!r}, 'w')", marker.exists)
    idle = role(tmp_path, "idle", SLEEP, lambda: True)
    status, output = run(tmp_path, [worker, idle])
    assert status == 0
    assert "starting worker" in output
    assert "idle" not in output  # nothing to do: never started


def test_a_failure_stops_the_others_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.log").write_text("from an earlier attempt\n")
    bad = role(tmp_path, "bad", "for i in range(20): print('line', i)\nraise SystemExit(3)")
    good = role(tmp_path, "good", WITH_GRANDCHILD + "time.sleep(60)")
    started = time.monotonic()
    status, output = run(tmp_path, [good, bad])
    assert status == 1
    took = time.monotonic() - started
    assert took < 8
    said = re.search(r"bad exited with status 3, (\d+) s after its start", output)
    assert said and int(said[1]) <= round(took)  # 0 s, unless the machine is slower than that
    assert f"the end of {tmp_path / 'bad.log'}:" in output
    assert "line 19" in output
    assert "line 5" in output
    assert "line 4\n" not in output
    assert "earlier" not in output
    assert "the run continues from here" in output
    log = tmp_path / "good.log"
    assert not any(alive(int(pid)) for pid in log.read_text().split())
    assert "line 19" in (tmp_path / "supervisor.log").read_text()


def test_refused_input_keeps_its_status(tmp_path: Path) -> None:
    assert run(tmp_path, [role(tmp_path, "picky", "raise SystemExit(2)")])[0] == 2


def test_death_by_signal_is_named(tmp_path: Path) -> None:
    status, output = run(tmp_path, [role(tmp_path, "victim", "import os; os.kill(os.getpid(), 9)")])
    assert status == 1
    assert "victim was ended by SIGKILL (out of memory?)" in output
    assert describe_exit(-11) == "was ended by SIGSEGV"


def test_a_role_is_started_again_when_work_comes_back(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    worker = role(tmp_path, "worker", f"open({str(shard)!r}, 'w'); print('worked')", shard.exists)
    checked = tmp_path / "checked"
    code = f"""
        import os, time
        while not os.path.exists({str(shard)!r}): time.sleep(0.02)
        time.sleep(0.5)  # until the worker has left
        os.remove({str(shard)!r}); open({str(checked)!r}, "w")
    """
    status, output = run(tmp_path, [worker, role(tmp_path, "checker", code, checked.exists)])
    assert status == 0
    assert "starting worker again" in output
    assert (tmp_path / "worker.log").read_text() == "worked\nworked\n"


def test_a_role_that_leaves_its_work_undone_does_not_loop(tmp_path: Path) -> None:
    status, output = run(tmp_path, [role(tmp_path, "lazy", "print('no')")])
    assert status == 1
    assert "left its work undone" in output
    assert (tmp_path / "lazy.log").read_text() == "no\n" * MAX_RETURNS


def test_a_command_that_cannot_be_started_leaves_nothing(tmp_path: Path) -> None:
    good = python(tmp_path, "good", WITH_GRANDCHILD + "time.sleep(60)")
    missing = Command("missing", ["/nowhere/python"], tmp_path / "missing.log")
    with pytest.raises(FileNotFoundError):
        run(tmp_path, [Role("pair", lambda: [good, missing], lambda: False)])
    words = (tmp_path / "good.log").read_text().split()
    assert not any(alive(int(pid)) for pid in words)


def test_grandchildren_end_with_their_process(tmp_path: Path) -> None:
    child = Child(python(tmp_path, "parent", WITH_GRANDCHILD))
    wait_until(lambda: child.poll() is not None)
    _, grandchild = pids_in(tmp_path / "parent.log")
    wait_until(lambda: not alive(grandchild))


def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    deaf = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("deaf", flush=True)
        time.sleep(60)
    """
    children = [Child(python(tmp_path, "deaf", deaf)), Child(python(tmp_path, "polite", SLEEP))]
    wait_until(lambda: "deaf" in (tmp_path / "deaf.log").read_text())
    assert [child.command.name for child in stop(children, grace_seconds=0.3)] == ["deaf"]
    assert [child.poll() for child in children] == [-signal.SIGKILL, -signal.SIGTERM]


SUPERVISOR = """
import sys
from pathlib import Path
from megatron_npd.config import LaunchConfig
from megatron_npd.supervise.console import Console
from megatron_npd.supervise.journal import Journal
from megatron_npd.supervise.children import Command
from megatron_npd.supervise.role_work import Role
from megatron_npd.supervise.supervisor import watch
from megatron_npd.run_directory import RunDirectory

folder, code = Path(sys.argv[1]), sys.argv[2]

def role(name):
    command = Command(name, [sys.executable, "-S", "-c", code], folder / f"{name}.log")
    return Role(name, lambda: [command], lambda: False)

run = RunDirectory(folder)
console, journal = Console(folder / "supervisor.log"), Journal(run)
roles, launch = [role("one"), role("two")], LaunchConfig(max_restarts=0)
sys.exit(watch(run, roles, console, journal, lambda children: "working", launch))
"""
DEAF = "import signal\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\n"


def start_supervisor(folder: Path, tail: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A supervisor in a process of its own, over two roles with a grandchild each; and their four process ids."""
    argv = [sys.executable, "-c", SUPERVISOR, str(folder), WITH_GRANDCHILD + tail]
    supervisor = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    pids = pids_in(folder / "one.log", folder / "two.log")
    assert all(map(alive, pids))
    return supervisor, pids


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals, status: int) -> None:
    supervisor, pids = start_supervisor(tmp_path, "time.sleep(60)")
    supervisor.send_signal(number)
    output = supervisor.communicate(timeout=20)[1]
    assert supervisor.returncode == status
    reason = "the time limit is near: " if number is signal.SIGUSR1 else ""
    assert f"{number.name}: {reason}stopping the roles" in output
    assert read_journal(RunDirectory(tmp_path))[-1]["signal"] == number.name
    assert "the run continues from here" in output
    assert not any(map(alive, pids))


def test_the_second_signal_kills_at_once(tmp_path: Path) -> None:
    supervisor, pids = start_supervisor(tmp_path, DEAF + "print('deaf', flush=True)\ntime.sleep(60)")
    wait_until(lambda: all("deaf" in (tmp_path / f"{name}.log").read_text() for name in ("one", "two")))
    supervisor.send_signal(signal.SIGINT)
    wait_until(lambda: "stopping" in (tmp_path / "supervisor.log").read_text())
    assert alive(pids[0])
    supervisor.send_signal(signal.SIGTERM)  # another one says nothing new
    time.sleep(0.5)
    assert alive(pids[0])
    asked = time.monotonic()
    supervisor.send_signal(signal.SIGINT)
    output = supervisor.communicate(timeout=20)[1]
    assert time.monotonic() - asked < 5  # grace_seconds is 60
    assert supervisor.returncode == 130
    assert "one did not stop and was killed" in output
    assert not any(map(alive, pids))


def mark_of(pid: int) -> str:
    """The mark by which a process is known to belong to its supervisor."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(entry for entry in environment if entry.startswith(MARK.encode() + b"=")).decode().partition("=")[2]


def guardians(mark: str) -> list[int]:
    """Guardian processes of a mark."""
    found = subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


HIDDEN = """
hidden = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
print(subprocess.Popen(hidden, start_new_session=True).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("guardian_first", [False, True], ids=["supervisor", "guardian_then_supervisor"])
def test_nothing_outlives_a_killed_supervisor(tmp_path: Path, guardian_first: bool) -> None:
    """Roles, what they started, and what hides from them in a session of its own."""
    supervisor, pids = start_supervisor(tmp_path, HIDDEN)
    logs = [tmp_path / f"{name}.log" for name in ("one", "two")]
    wait_until(lambda: all(len(log.read_text().split()) == 3 for log in logs))
    pids = [int(word) for log in logs for word in log.read_text().split()]
    mark = mark_of(pids[0])
    assert sorted(marked(mark)) == sorted(pids)
    [guardian] = guardians(mark)
    if guardian_first:
        os.kill(guardian, signal.SIGKILL)
        wait_until(lambda: guardians(mark) not in ([], [guardian]))
    supervisor.kill()
    supervisor.communicate()
    wait_until(lambda: not any(map(alive, pids)), 5)
    wait_until(lambda: not guardians(mark), 5)


def test_one_supervisor_a_run_directory(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(inputs.path)]) == 0
    capsys.readouterr()
    before = (inputs.run / "config.toml").read_bytes()
    inputs.set("launch", {"poll_seconds": 0.7})  # may change between starts, but not under a running one
    with open(inputs.run / "supervisor.lock", "w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["run", str(inputs.path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "process 4711 already runs it" in captured.err
    assert (inputs.run / "config.toml").read_bytes() == before


def test_leases_of_dead_processes_are_returned(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    here = socket.gethostname()
    holders = [(here, gone.pid), (here, os.getpid()), ("elsewhere", gone.pid)]
    for unit, (host, pid) in enumerate(holders):
        write_json(directory.lease("rollouts", "round_0000", unit), {"host": host, "pid": pid})
    write_atomically(directory.lease("samples", "warmup", 0), b'{"host": ')
    assert return_stale_leases(directory) == 1
    left = [directory.lease("rollouts", "round_0000", unit).exists() for unit in range(3)]
    assert left == [False, True, True]
    assert directory.lease("samples", "warmup", 0).exists()
    assert return_stale_leases(RunDirectory(tmp_path / "empty")) == 0


ROLE_AT_WORK = """
import sys, time
from pathlib import Path
from megatron_npd.buffer.leases import lease
from megatron_npd.cli import _enter_role, _parser

_enter_role(_parser().parse_args(["rollout", sys.argv[1]]), "rollout")
with lease(Path(sys.argv[2]), 300):
    print("working", flush=True)
    time.sleep(60)
"""


def test_a_stopped_role_returns_its_lease(inputs: Inputs, tmp_path: Path) -> None:
    assert main(["prepare", str(inputs.path)]) == 0
    path = tmp_path / "unit.json"
    argv = [sys.executable, "-c", ROLE_AT_WORK, str(inputs.run / "config.toml"), str(path)]
    child = Child(Command("role", argv, tmp_path / "role.log"))
    wait_until(lambda: "working" in (tmp_path / "role.log").read_text())
    assert path.exists()
    assert stop([child]) == []
    assert child.poll() == 143
    assert not path.exists()


def test_ranks_meet_at_a_fresh_place_each_start(inputs: Inputs, tmp_path: Path) -> None:
    inputs.set("training.data_parallel_size", 2)
    inputs.set("training.threads", 3)
    config, directory = inputs.config, RunDirectory(inputs.run)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    roles = {role.name: role for role in roles_of(config, directory, make_plan(config, 6, 3), scratch)}
    trainer, annotator, teacher, student = (
        roles[name] for name in ("trainer", "annotator", "rollout_teacher", "rollout")
    )
    first, second = trainer.commands(), trainer.commands()
    assert [command.name for command in first] == ["trainer", "trainer.rank1"]
    assert [command.env["RANK"] for command in first] == ["0", "1"]
    assert {command.env["OMP_NUM_THREADS"] for command in first} == {"3"}
    places = [{command.env["NPD_RENDEZVOUS"] for command in commands} for commands in (first, second)]
    assert len(places[0]) == len(places[1]) == 1
    assert places[0] != places[1]
    assert annotator.commands()[0].argv[-2:] == ["annotator", str(directory.config)]
    assert teacher.commands()[0].argv[-2:] == ["--policy", "teacher"]
    assert "RANK" not in student.commands()[0].env
    assert not any(role.is_done() for role in (trainer, annotator, teacher, student))


@pytest.mark.parametrize(("turns", "warmup"), [("on", 1), ("on", 0), ("off", 1)])
def test_roles_start_when_there_is_something_to_do(inputs: Inputs, tmp_path: Path, turns: str, warmup: int) -> None:
    """Where they take turns; and the student's engine when the teacher's has left, on the version it samples from."""
    inputs.set("launch.turns", turns)
    inputs.set("warmup.samples_per_prompt", warmup)
    inputs.set("rollout.samples_per_unit", 3)
    directory, plan = RunDirectory(inputs.run), make_plan(inputs.config, 6, 3)
    roles = roles_of(inputs.config, directory, plan, tmp_path)

    def wanted() -> list[str]:
        return [role.name for role in roles if role.is_wanted()]

    everybody = ["rollout_teacher", "annotator", "trainer", "rollout"]
    if turns == "off":
        assert wanted() == everybody
        return
    first = "warmup" if warmup else "round_0000"
    assert wanted() == ["rollout_teacher"] + ([] if warmup else ["trainer"])
    write_atomically(directory.unit("rollouts", "heldout", 0), b"")
    directory.version(0).mkdir(parents=True)
    assert wanted() == ["rollout_teacher"] + ([] if warmup else ["trainer", "rollout"])
    write_atomically(directory.unit("rollouts", first, 0), b"")
    assert wanted() == (["rollout_teacher", "annotator"] if warmup else everybody)
    write_atomically(directory.unit("samples", first, 0), b"")
    assert wanted() == (["rollout_teacher", "annotator", "trainer"] if warmup else everybody)
    directory.version(1).mkdir(parents=True)
    write_atomically(directory.unit("rollouts", first, 1), b"")
    assert wanted() == everybody


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_a_run_without_rounds_needs_no_sidecar_of_the_students(inputs: Inputs, tmp_path: Path, source: str) -> None:
    inputs.set("launch.turns", "on")
    inputs.set("rounds.count", 0)
    inputs.set("warmup", {"source": source, "samples_per_prompt": 1})
    directory, plan = RunDirectory(inputs.run), make_plan(inputs.config, 6, 3)
    roles = {role.name: role for role in roles_of(inputs.config, directory, plan, tmp_path)}
    assert roles["rollout"].is_done(), "it is never started"
    assert not roles["rollout_teacher"].is_done()
    assert not roles["trainer"].is_wanted() and not roles["annotator"].is_wanted()
    for stage in ("heldout", "warmup"):
        write_atomically(directory.unit("rollouts", stage, 0), b"")
    assert roles["rollout_teacher"].is_done()
    assert roles["annotator"].is_wanted() and not roles["trainer"].is_wanted()
    write_atomically(directory.unit("samples", "warmup", 0), b"")
    assert roles["trainer"].is_wanted() and not roles["annotator"].is_done()
    for version in (0, 1):
        write_atomically(directory.evaluation(version), b"")
    assert roles["annotator"].is_done()


def test_first_starts_wait_until_they_are_wanted(tmp_path: Path) -> None:
    made, seen, done = (tmp_path / name for name in ("made", "seen", "done"))
    maker = role(tmp_path, "maker", f"import time; time.sleep(1.5); open({str(made)!r}, 'w')", made.exists)
    code = f"open({str(seen)!r}, 'w').write(str(__import__('os').path.exists({str(made)!r})))\n"
    user = role(tmp_path, "user", code + f"open({str(done)!r}, 'w')", done.exists)
    status, output = run(tmp_path, [replace(user, is_wanted=made.exists), maker])
    assert status == 0 and seen.read_text() == "True"
    assert output.index("starting maker") < output.index("starting user")


def test_a_run_never_stands_still(tmp_path: Path) -> None:
    """Work is left, and nobody is wanted: the roles are started all the same."""
    done = tmp_path / "done"
    stubborn = role(tmp_path, "stubborn", f"open({str(done)!r}, 'w')", done.exists)
    status, _ = run(tmp_path, [replace(stubborn, is_wanted=lambda: False)])
    assert status == 0 and done.exists()


def test_progress_is_read_from_the_run_directory(inputs: Inputs) -> None:
    inputs.set("rollout.samples_per_unit", 2)
    directory = RunDirectory(inputs.run)
    plan = make_plan(inputs.config, 6, 3)
    progress = Progress(directory, plan, Journal(directory))
    assert progress.describe([]) == "heldout: 0/2 units rolled out"
    for unit in range(2):
        write_atomically(directory.unit("rollouts", "heldout", unit), b"")
    write_atomically(directory.unit("rollouts", "round_0000", 0), b"")
    directory.metrics("trainer").parent.mkdir()
    with open(directory.metrics("trainer"), "w") as file:
        file.write('{"time": 1, "event": "step", "step": 3, "train/loss": 1.25}\n{"time": 2, "event": "st')
    assert progress.describe([]) == "round_0000: 1/3 units rolled out, 0 annotated | step 3 loss 1.2500"
    for index in (0, 1):
        for unit in range(3):
            write_atomically(directory.unit("samples", f"round_000{index}", unit), b"")
    assert progress.describe([]).startswith("every response annotated")
    progress.finish()
    phases = [
        record["name"] for record in read_metrics(directory.metrics("x").parent) if record.get("event") == "phase"
    ]
    assert phases == ["heldout", "round_0000", "finishing"]


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert tail(log, 3) == []
    log.write_bytes(b"torn " * 4000 + b"\n" + b"whole\n" * 3)
    assert tail(log, 9) == ["whole"] * 3, "nothing that begins in the middle of a line"
    log.write_bytes(
        b"x" * 100_000 + b"\nold\n\n10%\r50%\r100%\n2026-01-02 03:04:05 INFO rank 1 waiting for \xff\n[W] noise\n"
    )
    assert tail(log, 3) == ["100%", "2026-01-02 03:04:05 INFO rank 1 waiting for \ufffd", "[W] noise"]
    assert tail(log, 3, start=log.stat().st_size) == []


def test_the_last_record_of_an_event(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m.jsonl", "trainer")
    assert last_record(tmp_path / "m.jsonl", "step") is None
    metrics.log("step", 1)
    metrics.log("step", 2)
    metrics.log("publish", version=1)
    record = last_record(tmp_path / "m.jsonl", "step")
    assert record is not None
    assert record["step"] == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_console_on_a_terminal_and_in_a_file(tmp_path: Path) -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        console = Console(tmp_path / "log", stream)
        assert console.wants_progress
        console.progress("working")
        assert not console.wants_progress
        console.progress("working")
        console.say("done")
    assert terminal.getvalue() == "\r\x1b[Knpd: working" * 2 + "\r\x1b[Knpd: done\n"
    assert file.getvalue() == "npd: working\nnpd: done\n"
