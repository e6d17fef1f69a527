"""Trained stages are collected and still count as done; the buffer's limit delays later stages and never stops."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from shard_factory import make_shard
from small_config import make_config
from system_calls import killed_at

from megatron_npd.buffer.listing import finished_units, is_finished, stage_bytes, unfinished_units
from megatron_npd.buffer.plan import Plan, make_plan
from megatron_npd.buffer.retention import KINDS, collected, has_room, is_trained, retire_stages
from megatron_npd.buffer.shards import write_shard
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import Verdict

ROUNDS = ["round_0000", "round_0001", "round_0002"]


@pytest.fixture
def plan() -> Plan:
    return make_plan(make_config(rounds={"count": 3}, rollout={"samples_per_unit": 4}), 10, 4)


def fill(run: RunDirectory, plan: Plan, *names: str) -> RunDirectory:
    """Write every shard of some stages."""
    for name in names:
        for unit in range(plan.stages[name].units):
            for kind in KINDS:
                write_shard(run.unit(kind, name, unit), make_shard(kind))
    return run


def test_units_are_listed_by_their_shards_alone(tmp_path: Path, plan: Plan) -> None:
    run, stage = RunDirectory(tmp_path), plan.stages["round_0000"]
    assert (finished_units(run, "rollouts", stage), unfinished_units(run, "rollouts", stage)) == (set(), [0, 1, 2])
    fill(run, plan, stage.name)
    assert is_finished(run, "rollouts", stage)
    path = run.unit("rollouts", stage.name, 1)
    path.rename(path.with_name(path.name + ".quarantined"))
    path.with_name(f".{path.name}.abc.tmp").touch()
    assert unfinished_units(run, "rollouts", stage) == [1]


def test_trained_stages_but_the_newest_are_collected_and_still_count_as_done(tmp_path: Path, plan: Plan) -> None:
    run = fill(RunDirectory(tmp_path), plan, *ROUNDS)
    size = stage_bytes(run, "samples", ROUNDS[0])
    retire_stages(run, plan, ROUNDS[:2], keep=1)
    verdicts = [Verdict(value).name.lower() for value in make_shard("samples")["verdict"]] * 3
    figures = collected(run, "samples", ROUNDS[0])
    assert (figures["units"], figures["samples"], figures["bytes"]) == (3, 9, size) and size > 0
    assert figures["verdicts"] == {verdict.name.lower(): verdicts.count(verdict.name.lower()) for verdict in Verdict}
    for kind in KINDS:
        assert is_finished(run, kind, plan.stages[ROUNDS[0]]) and not run.unit(kind, ROUNDS[0], 0).exists()
        assert collected(run, kind, ROUNDS[1]) is None and run.unit(kind, ROUNDS[1], 2).exists()
        assert stage_bytes(run, kind, ROUNDS[0]) == 0
    assert [is_trained(run, name) for name in ROUNDS] == [True, True, False]


def test_all_is_kept_where_nothing_else_is_asked(tmp_path: Path, plan: Plan) -> None:
    run = fill(RunDirectory(tmp_path), plan, *ROUNDS)
    retire_stages(run, plan, ROUNDS, keep=0)
    assert all(run.unit(kind, name, 0).exists() for kind in KINDS for name in ROUNDS)
    assert all(is_trained(run, name) for name in ROUNDS)


@pytest.mark.slow
def test_a_collection_killed_anywhere_is_finished_by_the_next(tmp_path: Path, plan: Plan) -> None:
    whole = collected_figures(fill(RunDirectory(tmp_path / "whole"), plan, *ROUNDS), plan)
    for stop in count(step=23):  # some 500 calls: a sample of them, all in another place
        run = fill(RunDirectory(tmp_path / str(stop)), plan, *ROUNDS)
        ended = not killed_at(stop, lambda run=run: retire_stages(run, plan, ROUNDS, keep=1))
        for kind in KINDS:
            stage = plan.stages[ROUNDS[0]]
            assert is_finished(run, kind, stage), "a unit would be generated again"
        assert collected_figures(run, plan) == whole
        if ended:
            break
    assert stop > 100


def collected_figures(run: RunDirectory, plan: Plan) -> list[dict]:
    retire_stages(run, plan, ROUNDS, keep=1)
    assert not [left for name in ROUNDS[:2] for left in run.unit("samples", name, 0).parent.glob("unit_*")]
    return [collected(run, kind, name) for kind in KINDS for name in ROUNDS[:2]]


def test_a_full_buffer_delays_later_stages_until_the_earlier_ones_are_trained(tmp_path: Path, plan: Plan) -> None:
    run = fill(RunDirectory(tmp_path), plan, ROUNDS[0])
    first, second = plan.stages[ROUNDS[0]], plan.stages[ROUNDS[1]]
    used = sum(stage_bytes(run, kind, first.name) for kind in KINDS)
    assert has_room(run, plan, second, 0) and has_room(run, plan, second, used + 1)
    assert not has_room(run, plan, second, used)
    assert has_room(run, plan, first, 1), "the trainer waits for this stage: a limit must not stop the run"
    retire_stages(run, plan, ROUNDS[:1], keep=0)
    assert has_room(run, plan, second, 1)
