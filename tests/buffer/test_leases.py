"""One worker at a time on a unit, and one result for ever, whatever workers do and whenever they die."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from megatron_npd.buffer import leases
from megatron_npd.buffer.leases import Lease, claim, filesystem_time, lease
from megatron_npd.files import create_atomically

SECONDS = 60.0


def let_expire(path: Path) -> None:
    """Make a lease look as if nobody had touched it for longer than it lives."""
    long_ago = time.time() - SECONDS - 1
    os.utime(path, (long_ago, long_ago))


def test_a_lease_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "unit.json"
    with lease(path, SECONDS) as first, lease(path, SECONDS) as second:
        assert first is not None and second is None
    assert not path.exists()
    with lease(path, SECONDS) as third:
        assert third is not None


def test_a_lease_nobody_touches_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "unit.json"
    path.write_text('{"host": "far", "pid": 12}')
    with lease(path, SECONDS) as held:
        assert held is None
    let_expire(path)
    with lease(path, SECONDS) as held:
        assert held is not None
        assert str(os.getpid()) in path.read_text()
    assert "taken over from process 12 of far" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_lease_is_kept_alive_while_its_holder_works(tmp_path: Path) -> None:
    path = tmp_path / "unit.json"
    with lease(path, 1.5) as held:
        assert held
        until = time.monotonic() + 3.75
        while time.monotonic() < until:
            with lease(path, 1.5) as other:
                assert other is None
            time.sleep(0.05)


def test_a_lease_is_returned_by_a_holder_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "unit.json"
    with pytest.raises(RuntimeError), lease(path, SECONDS):
        raise RuntimeError
    assert not path.exists()


def test_a_lost_lease_is_noticed_and_the_new_holders_stays(tmp_path: Path) -> None:
    path = tmp_path / "unit.json"
    with lease(path, SECONDS) as stopped:
        let_expire(path)
        successor = claim(path, SECONDS)
        assert successor is not None and successor.is_held()
        assert not stopped.is_held() and not stopped.touch()
    assert successor.is_held(), "the late holder gave back a lease that was not its own"


def test_of_two_that_take_over_the_late_one_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw the lease expired; one took it over before the other came to remove it."""
    path = tmp_path / "unit.json"
    path.write_text("{}")
    let_expire(path)
    rename, quick = os.rename, []

    def overtaken(source: Path, target: Path) -> None:
        if not quick:
            quick.append(None)
            quick[0] = claim(path, SECONDS)
        rename(source, target)

    monkeypatch.setattr(leases.os, "rename", overtaken)
    assert claim(path, SECONDS) is None
    assert quick[0] is not None and quick[0].is_held()


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_clocks_of_hosts_may_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    """A worker whose clock is an hour off neither steals a living lease nor waits for ever for a dead one."""
    path, now = tmp_path / "unit.json", time.time
    monkeypatch.setattr(leases.time, "time", lambda: now() + skew)
    living = claim(path, SECONDS)
    assert living is not None and claim(path, SECONDS) is None
    let_expire_by(path, now() - SECONDS - 1)
    assert claim(path, SECONDS) is not None


def let_expire_by(path: Path, moment: float) -> None:
    os.utime(path, (moment, moment))


def test_the_filesystems_time_is_that_of_a_new_file(tmp_path: Path) -> None:
    before = filesystem_time(tmp_path)
    (tmp_path / "new").touch()
    assert before <= (tmp_path / "new").stat().st_mtime <= filesystem_time(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


class Workers(RuleBasedStateMachine):
    """Any number of workers on one unit: they claim, work, stall, finish late, die; leases expire under them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path, self.result = (Path(self.folder.name) / name for name in ("unit.json", "result"))
        self.working: dict[int, Lease] = {}
        self.first: bytes | None = None
        self.names = iter(range(10_000))

    @rule()
    def a_worker_comes(self) -> None:
        lease_there, expired = self.path.exists(), self._is_expired()
        held = claim(self.path, SECONDS)
        assert (held is not None) == (not lease_there or expired)
        if held:
            self.working[next(self.names)] = held

    @rule(data=st.data())
    def a_worker_dies(self, data: st.DataObject) -> None:
        for worker in self._one(data):
            self.working.pop(worker)._file.close()  # as the kernel does

    @rule(data=st.data())
    def a_worker_shows_a_sign_of_life(self, data: st.DataObject) -> None:
        for worker in self._one(data):
            self.working[worker].touch()

    @rule(data=st.data())
    def a_worker_finishes(self, data: st.DataObject) -> None:
        """Whether its lease is still its own or not: the worst of stalled workers does not look."""
        for worker in self._one(data):
            content = b"result of worker %d" % worker
            write = functools.partial(Path.write_bytes, data=content)
            assert create_atomically(self.result, write) == (self.first is None)
            self.first = self.first or content
            self.working.pop(worker).give_back()

    @rule()
    def time_passes(self) -> None:
        if self.path.exists():
            let_expire(self.path)

    @invariant()
    def at_most_one_holds_the_lease(self) -> None:
        assert sum(held.is_held() for held in self.working.values()) <= 1

    @invariant()
    def the_first_result_stays(self) -> None:
        assert (self.result.read_bytes() if self.result.exists() else None) == self.first

    @invariant()
    def nothing_is_left_lying_about(self) -> None:
        assert {entry.name for entry in self.path.parent.iterdir()} <= {"unit.json", "result"}

    def teardown(self) -> None:
        """Everybody dies: the unit is free again once the lease has expired."""
        self.time_passes()
        assert claim(self.path, SECONDS) is not None
        self.folder.cleanup()

    def _is_expired(self) -> bool:
        return self.path.exists() and time.time() - self.path.stat().st_mtime > SECONDS

    def _one(self, data: st.DataObject) -> Iterator[int]:
        if self.working:
            yield data.draw(st.sampled_from(sorted(self.working)))


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
