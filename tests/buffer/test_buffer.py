"""What roles exchange through the filesystem: shards, leases, the plan, units of work."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_factory import equal, make_shard
from small_config import make_config

from megatron_npd.buffer.plan import make_plan, sampling_seed, training_order
from megatron_npd.buffer.shards import CorruptShardError, read_or_quarantine, read_shard, write_shard
from megatron_npd.config import Config
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import GIVEN_VERSION

# --- shards ---


@pytest.mark.parametrize("kind", ["rollouts", "samples"])
def test_a_shard_round_trips(tmp_path: Path, kind: str) -> None:
    shard, path = make_shard(kind), tmp_path / "deep" / "unit.safetensors"
    write_shard(path, shard)
    again = read_shard(path, kind)
    assert equal(again, shard)
    assert len(again) == 3
    assert again.prompt(1).tolist() == shard["prompt_ids"][1:3].tolist()
    assert len(again.response(0)) == 0
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_an_empty_shard_round_trips(tmp_path: Path) -> None:
    empty = make_shard("rollouts", rows=0)
    write_shard(tmp_path / "u", empty)
    assert equal(read_shard(tmp_path / "u", "rollouts"), empty)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["rollouts", "samples"])
@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_every_flipped_byte_is_detected_or_harmless(tmp_path: Path, kind: str, mask: int) -> None:
    shard, path = make_shard(kind), tmp_path / "unit.safetensors"
    write_shard(path, shard)
    content = path.read_bytes()
    undetected = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= mask
        path.write_bytes(damaged)
        try:
            assert equal(read_shard(path, kind), shard), f"byte {position} changed the shard unnoticed"
            undetected += 1
        except CorruptShardError:
            continue
    assert undetected < 8  # padding between the header and the data


@pytest.mark.heavy
def test_every_truncation_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "unit.safetensors"
    write_shard(path, make_shard("samples"))
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CorruptShardError, match=r"unit\.safetensors"):
            read_shard(path, "samples")
    path.write_bytes(content + b"x")
    with pytest.raises(CorruptShardError):
        read_shard(path, "samples")


def test_a_shard_of_another_kind_or_place_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "unit", make_shard("rollouts"))
    with pytest.raises(CorruptShardError, match="rollouts of schema 2, expected samples"):
        read_shard(tmp_path / "unit", "samples")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda c: c.pop("seed"), "differ from the schema"),
        (lambda c: c.update(extra=np.zeros(3)), "differ from the schema"),
        (lambda c: c.update(seed=c["seed"].astype("int32")), "column seed is int32"),
        (lambda c: c.update(seed=c["seed"][:2]), "column seed has 2 rows"),
        (lambda c: c.update(behaviour_logprobs=c["behaviour_logprobs"][:1]), "rows along R"),
        (lambda c: c.update(prompt_offsets=np.array([0, 4, 3, 6])), "not a partition"),
        (lambda c: c.update(response_offsets=np.array([0, 0, 1, 2])), "not a partition of 3"),
    ],
)
def test_columns_that_break_the_schema_are_not_written(
    tmp_path: Path, spoil: Callable[[dict[str, np.ndarray]], object], complaint: str
) -> None:
    shard = make_shard("rollouts")
    spoil(shard.columns)
    with pytest.raises(ValueError, match=complaint):
        write_shard(tmp_path / "unit", shard)
    assert not list(tmp_path.iterdir())


def test_a_corrupt_shard_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "unit_000000.safetensors"
    write_shard(path, make_shard("rollouts"))
    assert read_or_quarantine(path, "rollouts") is not None
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.ERROR):
        assert read_or_quarantine(path, "rollouts") is None
    assert "will be redone" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["unit_000000.safetensors.quarantined"]


# --- the plan ---


def test_stages_in_order_with_their_versions() -> None:
    without = make_plan(make_config(rounds={"count": 3}), 10, 4)
    assert list(without.stages) == ["heldout", "round_0000", "round_0001", "round_0002"]
    assert [stage.version for stage in without.round_stages] == [0, 1, 2]
    assert without.final_version == 3
    warm = make_plan(make_config(warmup={"samples_per_prompt": 2}), 10, 4)
    assert [stage.name for stage in warm.training_stages] == ["warmup", "round_0000", "round_0001"]
    assert [stage.version for stage in warm.round_stages] == [1, 2]
    assert [stage.name for stage in warm.teacher_stages] == ["heldout", "warmup"]
    assert len(warm.stages["warmup"].prompt_index) == 20


@given(prompts=st.integers(1, 60), per_round=st.integers(0, 70), samples=st.integers(1, 3), per_unit=st.integers(1, 20))
def test_units_partition_a_stage_and_identities_are_unique(
    prompts: int, per_round: int, samples: int, per_unit: int
) -> None:
    rounds = {"count": 2, "prompts_per_round": per_round, "samples_per_prompt": samples}
    plan = make_plan(make_config(rounds=rounds, rollout={"samples_per_unit": per_unit}), prompts, 1)
    for stage in plan.round_stages:
        identities = set(zip(stage.prompt_index.tolist(), stage.sample_index.tolist(), strict=True))
        assert len(identities) == len(stage.prompt_index) == min(per_round or prompts, prompts) * samples
        bounds = [stage.rows(unit) for unit in range(stage.units)]
        assert bounds[0].start == 0
        assert bounds[-1].stop == len(stage.prompt_index)
        assert all(one.stop == two.start for one, two in pairwise(bounds))


@given(
    prompts=st.integers(1, 40),
    answered=st.sets(st.integers(0, 39)),
    share=st.floats(0.0, 0.9),
    per_round=st.integers(0, 50),
    samples=st.integers(1, 3),
    per_unit=st.integers(1, 20),
)
def test_given_responses_come_after_a_rounds_own(
    prompts: int, answered: set[int], share: float, per_round: int, samples: int, per_unit: int
) -> None:
    there = np.array(sorted(index for index in answered if index < prompts), np.int64)
    rounds = {"count": 3, "prompts_per_round": per_round, "samples_per_prompt": samples, "given_share": share}
    config = make_config(rounds=rounds, rollout={"samples_per_unit": per_unit})
    plan, without = (
        make_plan(config, prompts, 1, there),
        make_plan(make_config(rounds=rounds | {"given_share": 0.0}), prompts, 1),
    )
    for stage in plan.round_stages:
        own = np.arange(stage.own)
        assert np.array_equal(stage.prompt_index[own], without.stages[stage.name].prompt_index), "as without given ones"
        assert stage.given == min(round(stage.own * share / (1 - share)), len(there))
        assert set(stage.prompt_index[stage.own :].tolist()) <= set(there.tolist())
        assert set(stage.sample_index[stage.own :].tolist()) <= {samples}
        identities = set(zip(stage.prompt_index.tolist(), stage.sample_index.tolist(), strict=True))
        assert len(identities) == len(stage.prompt_index) == stage.own + stage.given
        rows = [row for unit in range(stage.units) for row in range(*stage.rows(unit).indices(len(identities)))]
        assert rows == list(range(len(identities))), "units partition the stage"
        for unit in range(stage.units):
            assert (
                (stage.version_of(unit) == GIVEN_VERSION)
                == stage.is_given(unit)
                == (stage.rows(unit).start >= stage.own)
            )


def test_rounds_walk_through_all_given_responses_before_one_comes_again() -> None:
    config = make_config(rounds={"count": 4, "prompts_per_round": 10, "given_share": 0.5})
    answered = np.arange(0, 80, 2)
    rounds = [stage.prompt_index[stage.own :].tolist() for stage in make_plan(config, 100, 1, answered).round_stages]
    assert sorted(np.concatenate(rounds).tolist()) == answered.tolist()


def test_a_warm_up_on_data_takes_the_prompts_that_have_a_response() -> None:
    answered = np.array([3, 5, 8, 9])
    config = make_config(warmup={"source": "data"}, rounds={"count": 0})
    plan = make_plan(config, 20, 4, answered)
    warmup = plan.stages["warmup"]
    assert warmup.prompt_index.tolist() == answered.tolist() and warmup.own == 0 and warmup.given == 4
    assert (plan.first_round_version, plan.final_version, plan.round_stages) == (1, 1, [])
    assert warmup.publishes == 1 and plan.training_stages == [warmup]
    some = make_plan(make_config(warmup={"source": "data", "prompts": 2}), 20, 4, answered).stages["warmup"]
    assert len(some.prompt_index) == 2 and set(some.prompt_index.tolist()) < set(answered.tolist())


def test_warmup_takes_all_prompts_or_some_at_random() -> None:
    some, other = (
        make_plan(make_config(seed=seed, warmup={"samples_per_prompt": 2, "prompts": 12}), 50, 1).stages["warmup"]
        for seed in (1, 2)
    )
    assert len(some.prompt_index) == 24 and len(set(some.prompt_index.tolist())) == 12
    assert set(some.prompt_index.tolist()) != set(range(12)), "a file may be sorted by kind"
    assert set(some.prompt_index.tolist()) != set(other.prompt_index.tolist())
    for prompts in (0, 50, 70):
        whole = make_plan(make_config(warmup={"samples_per_prompt": 1, "prompts": prompts}), 50, 1).stages["warmup"]
        assert whole.prompt_index.tolist() == list(range(50))


def test_rounds_walk_through_all_prompts_before_one_comes_again() -> None:
    plan = make_plan(make_config(rounds={"count": 8, "prompts_per_round": 25}), 100, 1)
    rounds = [set(stage.prompt_index.tolist()) for stage in plan.round_stages]
    assert set.union(*rounds[:4]) == set.union(*rounds[4:]) == set(range(100))
    assert rounds[:4] != rounds[4:]


def test_the_plan_is_a_function_of_configuration_and_sizes() -> None:
    one, two = (make_plan(make_config(rounds={"count": 2, "prompts_per_round": 7}), 50, 3) for _ in range(2))
    other = make_plan(make_config(rounds={"count": 2, "prompts_per_round": 7}, seed=5), 50, 3)  # type: ignore[arg-type]
    for name, stage in one.stages.items():
        assert np.array_equal(stage.prompt_index, two.stages[name].prompt_index)
    assert not np.array_equal(one.stages["round_0000"].prompt_index, other.stages["round_0000"].prompt_index)


def test_sampling_seeds_differ_and_stay() -> None:
    seeds = {
        sampling_seed(1234, stage, prompt, sample)
        for stage in ("round_0000", "round_0001")
        for prompt in range(500)
        for sample in range(4)
    }
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(1234, "round_0000", 7, 1) == 1319478904  # a change here makes old runs unrepeatable


@given(st.sets(st.tuples(st.integers(0, 1000), st.integers(0, 3)), min_size=1, max_size=40), st.randoms())
def test_training_order_does_not_depend_on_arrival(identities: set[tuple[int, int]], random: object) -> None:
    arrived = list(identities)
    random.shuffle(arrived)  # type: ignore[attr-defined]
    visited = [
        [tuple(order[i]) for i in training_order(1, "round_0000", 2, np.array(order))]
        for order in (arrived, sorted(identities))
    ]
    assert visited[0] == visited[1]
    assert set(visited[0]) == identities


def test_epochs_and_stages_are_visited_in_orders_of_their_own() -> None:
    identities = np.stack([np.arange(50), np.zeros(50, dtype=np.int64)], axis=1)
    orders = {
        tuple(training_order(seed, stage, epoch, identities))
        for seed in (1, 2)
        for stage in ("round_0000", "round_0001")
        for epoch in (0, 1)
    }
    assert len(orders) == 8


# --- units of work, by real processes ---

WORKER = """
import os, sys, time
from pathlib import Path
from megatron_npd.buffer.plan import make_plan
from megatron_npd.buffer.work import take_units
from megatron_npd.config import load_config
from megatron_npd.run_directory import RunDirectory
from megatron_npd.files import write_atomically

config, stall = load_config(sys.argv[1]), int(sys.argv[2])
run = RunDirectory(Path(config.run_directory))
stage = make_plan(config, 60, 1).stages["round_0000"]
print("ready", flush=True)
for unit in take_units(run, config, "rollouts", stage):
    print(unit, flush=True)
    time.sleep(60 if unit == stall else 0.02)
    write_atomically(run.unit("rollouts", stage.name, unit), b"done")
"""


def start_worker(config: Config, stall: int = -1) -> subprocess.Popen[str]:
    path = Path(config.run_directory + ".toml")
    path.write_text(config.to_toml())
    return subprocess.Popen([sys.executable, "-c", WORKER, str(path), str(stall)], stdout=subprocess.PIPE, text=True)


def units_done(worker: subprocess.Popen[str]) -> list[int]:
    output, _ = worker.communicate(timeout=60)
    return [int(line) for line in output.split() if line != "ready"]


@pytest.mark.heavy
def test_two_workers_do_every_unit_once(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", rollout={"samples_per_unit": 2}, launch={"poll_seconds": 0.05})
    workers = [start_worker(config), start_worker(config)]
    done = [units_done(worker) for worker in workers]
    assert Counter(done[0] + done[1]) == Counter(range(30))
    assert not list(RunDirectory(tmp_path / "run").lease("rollouts", "round_0000", 0).parent.iterdir())


@pytest.mark.heavy
def test_the_unit_of_a_killed_worker_is_taken_over(tmp_path: Path) -> None:
    launch = {"poll_seconds": 0.05, "lease_seconds": 1.0}
    config = make_config(tmp_path / "run", rollout={"samples_per_unit": 20}, launch=launch)
    victim = start_worker(config, stall=0)
    assert victim.stdout is not None
    assert [victim.stdout.readline() for _ in range(2)] == ["ready\n", "0\n"]
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert sorted(units_done(start_worker(config))) == [0, 1, 2]
