"""What fails is started again, and what keeps failing is not: the policy on tables, then real processes."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from supervised import SLEEP, alive, python, role, run, until_supervisor_says, wait_until

from megatron_npd.config import LaunchConfig
from megatron_npd.errors import STORAGE_STATUS
from megatron_npd.files import write_json
from megatron_npd.run_directory import RunDirectory
from megatron_npd.supervise import shift
from megatron_npd.supervise.children import Child, Command
from megatron_npd.supervise.crew import Crew
from megatron_npd.supervise.journal import read_journal
from megatron_npd.supervise.restarts import Failure, delay_before_restart, related
from megatron_npd.supervise.role_work import Role

pytestmark = pytest.mark.slow

LAUNCH = LaunchConfig()


def failures(*history: tuple[float, int]) -> list[Failure]:
    """Failures at (time, work done by then)."""
    return [Failure(time, done, "failed") for time, done in history]


@pytest.mark.parametrize(
    ("history", "count"),
    [
        ([(0, 5)], 1),
        ([(0, 5), (10, 5)], 2),
        ([(0, 5), (10, 6)], 1),  # it got further
        ([(0, 5), (10, 6), (20, 6)], 2),
        ([(0, 7), (10, 5), (20, 5)], 3),  # a quarantined shard is work lost, not work done
        ([(0, 7), (10, 5), (20, 7)], 3),
        ([(0, 5), (2000, 5), (2001, 5)], 2),  # longer ago than restart_window_seconds
    ],
)
def test_failures_that_belong_together(history: list[tuple[float, int]], count: int) -> None:
    assert related(failures(*history), LAUNCH) == failures(*history)[-count:]


def test_delays_double_up_to_a_limit_and_end() -> None:
    launch = LaunchConfig(max_restarts=8)
    history = failures(*((float(second), 0) for second in range(9)))
    delays = [delay_before_restart(history[: n + 1], launch) for n in range(9)]
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, None]
    assert delay_before_restart(history[:1], LaunchConfig(max_restarts=0)) is None


def test_a_full_disk_is_given_time() -> None:
    assert delay_before_restart([Failure(0.0, 0, "full", STORAGE_STATUS)], LAUNCH) == 60


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 3)), min_size=1), st.integers(0, 5))
def test_a_role_is_given_up_only_after_enough_failures_without_progress(
    gaps: list[tuple[float, int]], restarts: int
) -> None:
    moments = [sum(gap for gap, _ in gaps[: n + 1]) for n in range(len(gaps))]
    history = failures(*zip(moments, (done for _, done in gaps), strict=True))
    launch = LaunchConfig(max_restarts=restarts, restart_window_seconds=50)
    delay = delay_before_restart(history, launch)
    recent = [failure for failure in history if history[-1].time - failure.time <= 50]
    if delay is None:
        before = [failure.done for failure in history[: len(history) - restarts - 1]]
        assert len(recent) > restarts
        assert max(failure.done for failure in history[-restarts:]) <= max([*before, history[-restarts - 1].done])
    else:
        assert 0 <= delay <= 60
    if len(recent) <= restarts:
        assert delay is not None
    if len(recent) > restarts and len({failure.done for failure in history}) == 1:
        assert delay is None


def failing(times: int, then: str, folder: Path) -> str:
    """Code that fails so many times and then does something else."""
    count = folder / "count"
    return f"""
import os, sys
with open({str(count)!r}, "a+") as file:
    file.write("x")
if os.path.getsize({str(count)!r}) <= {times}:
    print("no luck", flush=True)
    sys.exit(3)
{textwrap.dedent(then)}
"""


def test_a_failed_role_is_started_again_and_the_others_go_on(tmp_path: Path) -> None:
    done = tmp_path / "done"
    flaky = role(tmp_path, "flaky", failing(2, f"open({str(done)!r}, 'w')", tmp_path), done.exists)
    steady_code = f"import os, time\nprint('once')\nwhile not os.path.exists({str(done)!r}): time.sleep(0.02)"
    status, output = run(tmp_path, [flaky, role(tmp_path, "steady", steady_code, done.exists)], max_restarts=2)
    assert status == 0
    assert (tmp_path / "steady.log").read_text() == "once\n"
    assert output.count("flaky exited with status 3") == output.count("no luck") == 2
    assert "restart 2 of at most 2" in output
    events = [(record["event"], record.get("of")) for record in read_journal(RunDirectory(tmp_path))]
    assert events == [("failure", "flaky"), ("restart", "flaky")] * 2


def test_a_crash_loop_ends_the_run_with_every_reason(tmp_path: Path) -> None:
    code = failing(2, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", tmp_path)
    status, output = run(tmp_path, [role(tmp_path, "bad", code), role(tmp_path, "good", SLEEP)], max_restarts=2)
    assert status == 1
    summary = output[output.index("bad failed 3 times in ") :]
    assert "and made no progress" in summary
    assert summary.count("bad exited with status 3") == 2 and "bad was ended by SIGSEGV" in summary
    assert output.count("no luck") == 2
    assert "the run continues from here" in summary


def test_a_role_that_gets_further_is_never_given_up(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.touch()
    code = failing(5, "pass", tmp_path)
    status, output = run(
        tmp_path,
        [role(tmp_path, "slow", code, lambda: count.stat().st_size > 5, lambda: count.stat().st_size)],
        max_restarts=1,
    )
    assert status == 0
    assert output.count("slow exited with status 3") == 5


def test_a_failure_right_after_a_look_is_seen_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to have ended, but not yet how, it would be started again as if it had left its work undone."""
    failed = Crew.failed

    def look_and_let_it_end(crew: Crew) -> list[Child]:
        found = failed(crew)
        wait_until(lambda: not crew.running)
        return found

    monkeypatch.setattr(Crew, "failed", look_and_let_it_end)
    bad = role(tmp_path, "bad", "import time; time.sleep(0.5); raise SystemExit(3)")
    status, output = run(tmp_path, [bad], max_restarts=1)
    assert status == 1
    assert output.count("bad exited with status 3") == 4, "twice as it happened, twice among the reasons"
    assert "there is work for it" not in output


def test_refused_input_is_not_tried_again(tmp_path: Path) -> None:
    status, output = run(tmp_path, [role(tmp_path, "picky", "raise SystemExit(2)")], max_restarts=5)
    assert status == 2
    assert output.count("starting picky") == 1


def test_a_role_that_failed_when_its_work_was_done_is_left_alone(tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = f"open({str(done)!r}, 'w'); raise SystemExit(1)"
    status, output = run(tmp_path, [role(tmp_path, "hasty", code, done.exists)], max_restarts=1)
    assert status == 0
    assert "hasty is not started again: its work is done" in output


def test_all_ranks_of_a_role_are_started_again_together(tmp_path: Path) -> None:
    """Rank 1 is killed; rank 0, which would wait for it for ever, is ended and both begin anew."""
    done = tmp_path / "done"
    waits = (
        f"import os, time\nprint(os.getpid(), flush=True)\nwhile not os.path.exists({str(done)!r}): time.sleep(0.02)"
    )
    dies = f"""
import time
if os.path.getsize({str(tmp_path / "count")!r}) > 1:
    open({str(done)!r}, "w")
else:
    while not os.path.getsize({str(tmp_path / "pair.log")!r}): time.sleep(0.02)
    os.kill(os.getpid(), 9)
"""
    commands = [python(tmp_path, "pair", waits), python(tmp_path, "pair.rank1", failing(0, dies, tmp_path))]
    pair = Role("pair", lambda: commands, done.exists, lambda: 0)
    status, output = run(tmp_path, [pair], max_restarts=1)
    assert status == 0
    assert "pair.rank1 was ended by SIGKILL (out of memory?)" in output
    first, second = (int(pid) for pid in (tmp_path / "pair.log").read_text().split())
    assert first != second and not alive(first) and not alive(second)


def test_leases_of_the_dead_are_returned_before_the_restart(tmp_path: Path) -> None:
    lease = RunDirectory(tmp_path).lease("rollouts", "round_0000", 0)
    write_json(lease, {})
    done = tmp_path / "done"
    take = f"""
import json, socket
if os.path.getsize({str(tmp_path / "count")!r}) == 1:
    with open({str(lease)!r}, "w") as file:
        json.dump({{"host": socket.gethostname(), "pid": os.getpid()}}, file)
    sys.exit(1)
assert not os.path.exists({str(lease)!r})
open({str(done)!r}, "w")
"""
    assert run(tmp_path, [role(tmp_path, "worker", failing(0, take, tmp_path), done.exists)], max_restarts=1)[0] == 0


def test_a_log_that_cannot_be_written_is_a_failure_of_the_role_and_not_of_the_supervisor(tmp_path: Path) -> None:
    """Nobody, the superuser included, makes files in /sys."""
    done = tmp_path / "done"
    shut_out = Command("shut_out", [sys.executable, "-S", "-c", ""], Path("/sys/npd_shut_out.log"))
    code = f"import time; time.sleep(0.5); open({str(done)!r}, 'w')"
    roles = [Role("shut_out", lambda: [shut_out], done.exists), role(tmp_path, "other", code, done.exists)]
    status, output = run(tmp_path, roles, max_restarts=5, longest_restart_delay_seconds=0.3)
    assert status == 0
    assert "shut_out could not be started: /sys/npd_shut_out.log: Permission denied" in output
    assert "starting shut_out again in 0 s" in output


def test_a_role_without_room_for_its_files_waits_the_longest_time(tmp_path: Path) -> None:
    room = tmp_path / "room"
    code = f"import os, sys; sys.exit(0 if os.path.exists({str(room)!r}) else {STORAGE_STATUS})"
    clear = f"{until_supervisor_says(tmp_path, 'could not write or read its files')}\nopen({str(room)!r}, 'w')"
    started = time.monotonic()
    roles = [role(tmp_path, "full", code, room.exists), role(tmp_path, "clears", clear, room.exists)]
    status, output = run(tmp_path, roles, max_restarts=1, longest_restart_delay_seconds=2.0)
    assert status == 0
    assert f"full could not write or read its files (status {STORAGE_STATUS})" in output
    assert "starting full again in 2 s, restart 1 of at most 1" in output
    assert 2.0 < time.monotonic() - started < 15


HANGING = """
import sys, time
from pathlib import Path
from megatron_npd.process import activity
from megatron_npd.process.heartbeat import Heartbeat
from megatron_npd.run_directory import RunDirectory

folder, how = Path(sys.argv[1]), sys.argv[2]
print("at work", flush=True)
with Heartbeat(RunDirectory(folder), how, beat_seconds=0.05):
    with activity.waiting("somebody") if how == "waits" else activity.doing("the same thing for ever"):
        for _ in range(60):
            time.sleep(0.05)
            if how == "works":
                activity.progress()
            if how == "hangs":
                time.sleep(60)
(folder / how).touch()
"""


def test_what_hangs_is_killed_and_what_waits_or_works_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "LOOK_SECONDS", 0.1)

    def one(how: str) -> Role:
        command = Command(how, [sys.executable, "-c", HANGING, str(tmp_path), how], tmp_path / f"{how}.log")
        return Role(how, lambda: [command], (tmp_path / how).exists)

    started = time.monotonic()
    status, output = run(tmp_path, [one("waits"), one("works")], hang_seconds=2.0)
    assert (status, time.monotonic() - started < 20) == (0, True)
    assert "hung" not in output
    status, output = run(tmp_path, [one("hangs")], hang_seconds=1.0)
    assert status == 1
    assert "hangs was killed: it hung for 1 s (the same thing for ever)" in output
    assert "out of memory" not in output


def test_a_signal_ends_a_run_that_waits_for_a_restart(tmp_path: Path) -> None:
    """The supervisor sends the signal to itself, by one of its children."""
    code = f"""
{until_supervisor_says(tmp_path, "starting bad again")}
import os
os.kill({os.getpid()}, {int(signal.SIGUSR1)})
time.sleep(60)
"""
    roles = [role(tmp_path, "bad", "raise SystemExit(1)"), role(tmp_path, "caller", code)]
    started = time.monotonic()
    status, output = run(tmp_path, roles, max_restarts=3, restart_delay_seconds=30.0)
    assert status == 138
    assert time.monotonic() - started < 10
    assert output.count("starting bad") == 2 and "starting bad again in 30 s" in output
    log = tmp_path / "supervisor.log"
    wait_until(lambda: "stopped; started again, the run continues from here" in log.read_text())
