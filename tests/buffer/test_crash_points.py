"""A writer killed at any of its system calls leaves nothing or a whole valid file, and the work can be done again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from shard_factory import equal, make_shard
from system_calls import killed_at

from megatron_npd.buffer.leases import claim
from megatron_npd.buffer.shards import Shard, read_shard, write_shard
from megatron_npd.files import read_json, write_json

pytestmark = pytest.mark.slow


def crash_everywhere(folder: Path, action: Callable[[Path], object]) -> list[Path]:
    """Folders in which `action` was killed at its first, second, ... system-call stop, until it ends by itself."""
    folders = []
    for stop in count():
        place = folder / f"{stop:04d}"
        place.mkdir()
        if not killed_at(stop, lambda place=place: action(place)):
            return folders
        folders.append(place)
    raise AssertionError


def test_the_killer_kills(tmp_path: Path) -> None:
    assert killed_at(0, lambda: (tmp_path / "a").mkdir())
    assert not (tmp_path / "a").exists()
    assert not killed_at(10_000, lambda: (tmp_path / "b").mkdir())
    assert (tmp_path / "b").exists()


def test_a_shard_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    shard = make_shard("rollouts", rows=200)
    folders = crash_everywhere(tmp_path, lambda place: write_shard(place / "unit", shard))
    outcomes = [(folder / "unit").exists() for folder in folders]
    assert len(folders) > 20 and set(outcomes) == {True, False}
    assert outcomes == sorted(outcomes), "it was there, and then not any more"
    for folder, there in zip(folders, outcomes, strict=True):
        if there:
            assert equal(read_shard(folder / "unit", "rollouts"), shard)
        assert write_shard(folder / "unit", shard) == (not there)
        assert equal(read_shard(folder / "unit", "rollouts"), shard)


def test_a_second_writer_killed_anywhere_changes_nothing(tmp_path: Path) -> None:
    first, second = make_shard("samples"), make_shard("samples", rows=7)

    def write_again(place: Path) -> None:
        assert not write_shard(place / "unit", second)

    for stop in count():
        place = tmp_path / f"{stop:04d}"
        write_shard(place / "unit", first)
        ended = not killed_at(stop, lambda place=place: write_again(place))
        assert equal(read_shard(place / "unit", "samples"), first)
        if ended:
            break
    assert stop > 20


def test_a_replaced_file_is_the_old_or_the_new(tmp_path: Path) -> None:
    old, new = {"at": 1, "pad": "x" * 5000}, {"at": 2, "pad": "y" * 9000}
    found = []
    for stop in count():
        path = tmp_path / f"{stop:04d}" / "state.json"
        write_json(path, old)
        ended = not killed_at(stop, lambda path=path: write_json(path, new))
        found.append(read_json(path))
        if ended:
            break
    assert all(value in (old, new) for value in found) and found[0] == old and found[-1] == new


def test_a_worker_killed_anywhere_in_claiming_leaves_a_lease_that_expires(tmp_path: Path) -> None:
    for folder in crash_everywhere(tmp_path, lambda place: claim(place / "unit.json", 60.0)):
        left = [entry.name for entry in folder.iterdir()]
        assert set(left) <= {"unit.json"}, "debris in the folder of leases"
        assert claim(folder / "unit.json", -1.0) is not None  # every lease is older than that: expired


@pytest.mark.parametrize("kind", ["rollouts", "samples"])
def test_the_factory_makes_shards_that_differ(kind: str) -> None:
    a, b = make_shard(kind), make_shard(kind, rows=7)
    assert not equal(a, Shard(kind, b.columns, a.metadata)) and isinstance(a["seed"], np.ndarray)
