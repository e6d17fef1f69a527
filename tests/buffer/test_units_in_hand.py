"""Holding several units of work at once: taken one by one, given back one by one, and all at the end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from small_config import make_config

from megatron_npd.buffer import work
from megatron_npd.buffer.plan import Plan, make_plan
from megatron_npd.buffer.work import UnitsInHand, WorkUnit, take_units
from megatron_npd.config import Config
from megatron_npd.files import write_atomically
from megatron_npd.run_directory import RunDirectory


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path / "run", rollout={"samples_per_unit": 20}, launch={"poll_seconds": 0.2})


@pytest.fixture
def plan(config: Config) -> Plan:
    """60 prompts: three units a round; 30 held out: two units."""
    return make_plan(config, 60, 30)


@pytest.fixture
def run(config: Config) -> RunDirectory:
    return RunDirectory(Path(config.run_directory))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, as the one entry: change it to let time pass."""
    now = [0.0]
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def finish(run: RunDirectory, hand: UnitsInHand, unit: WorkUnit) -> None:
    write_atomically(run.unit("rollouts", unit.stage.name, unit.number), b"done")
    hand.give_back(unit)


def names(units: list[WorkUnit]) -> list[str]:
    return [str(unit) for unit in units]


def test_units_of_several_stages_are_held_at_once_in_their_order(config: Config, plan: Plan, run: RunDirectory) -> None:
    stages = [plan.stages["heldout"], plan.stages["round_0000"]]
    with UnitsInHand(run, config, "rollouts", stages) as hand:
        units = [hand.take() for _ in range(5)]
        assert names(units) == [
            "heldout, unit 1 of 2",
            "heldout, unit 2 of 2",
            "round_0000, unit 1 of 3",
            "round_0000, unit 2 of 3",
            "round_0000, unit 3 of 3",
        ]
        assert hand.take() is None
        assert hand.next_stage() is stages[0], "held is not done"
        for unit in reversed(units):
            finish(run, hand, unit)
        assert hand.next_stage() is None


def test_what_one_holds_another_does_not_get(config: Config, plan: Plan, run: RunDirectory) -> None:
    stage = plan.stages["round_0000"]
    with UnitsInHand(run, config, "rollouts", [stage]) as ours, UnitsInHand(run, config, "rollouts", [stage]) as theirs:
        assert [ours.take().number, theirs.take().number, ours.take().number] == [0, 1, 2]
        assert ours.take() is None and theirs.take() is None


def test_a_worker_that_fails_gives_back_what_it_held(config: Config, plan: Plan, run: RunDirectory) -> None:
    stage = plan.stages["round_0000"]
    with pytest.raises(RuntimeError), UnitsInHand(run, config, "rollouts", [stage]) as hand:
        finish(run, hand, hand.take())
        hand.take(), hand.take()
        raise RuntimeError
    assert list(take_and_finish(config, run, stage)) == [1, 2], "the finished one stays finished"


def take_and_finish(config: Config, run: RunDirectory, stage: object) -> list[int]:
    done = []
    for unit in take_units(run, config, "rollouts", stage):
        write_atomically(run.unit("rollouts", stage.name, unit), b"done")
        done.append(unit)
    return done


def test_a_stage_that_must_not_begin_yet_holds_back_those_behind_it(
    config: Config, plan: Plan, run: RunDirectory, clock: list[float]
) -> None:
    open_stages: set[str] = set()
    stages = [plan.stages["heldout"], plan.stages["round_0000"]]
    with UnitsInHand(run, config, "rollouts", stages, lambda stage: stage.name in open_stages) as hand:
        assert hand.take() is None
        open_stages.add("heldout")
        clock[0] += 0.2  # launch.poll_seconds
        assert names([hand.take(), hand.take()]) == ["heldout, unit 1 of 2", "heldout, unit 2 of 2"]
        assert hand.take() is None
        open_stages.add("round_0000")
        clock[0] += 0.2
        assert str(hand.take()) == "round_0000, unit 1 of 3"


def test_a_worker_takes_the_units_alone_that_it_wants(config: Config, run: RunDirectory) -> None:
    mixed = make_config(run.root, rollout={"samples_per_unit": 20}, rounds={"count": 1, "given_share": 0.5})
    stage = make_plan(mixed, 60, 30).stages["round_0000"]
    with (
        UnitsInHand(run, config, "rollouts", [stage], wanted=lambda unit: unit.is_given) as given,
        UnitsInHand(run, config, "rollouts", [stage]) as any_of_them,
    ):
        units = list(iter(given.take, None))
        assert [unit.number for unit in units] == list(range(stage.own_units, stage.units)) and len(units) > 1
        assert [unit.number for unit in iter(any_of_them.take, None)] == list(range(stage.own_units))


def test_one_that_finds_nothing_does_not_look_again_at_every_step(
    config: Config, plan: Plan, run: RunDirectory, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage of 200,000 samples has hundreds of files to look for, and an engine makes a hundred steps a second."""
    looks, unfinished = [], work.unfinished_units

    def counted(*arguments: object) -> list[int]:
        looks.append(clock[0])
        return unfinished(*arguments)

    monkeypatch.setattr(work, "unfinished_units", counted)
    stage = plan.stages["heldout"]
    with UnitsInHand(run, config, "rollouts", [stage]) as ours, UnitsInHand(run, config, "rollouts", [stage]) as theirs:
        units = [theirs.take(), theirs.take()]
        looks.clear()
        for clock[0] in (10.0, 10.1, 10.19, 10.2, 10.3):
            assert ours.take() is None
        assert looks == [10.0, 10.2], "again after launch.poll_seconds = 0.2"
        theirs.give_back(units[1])
        assert ours.take() is None
        clock[0] = 10.4
        assert ours.take().number == 1, "what was given back undone"
