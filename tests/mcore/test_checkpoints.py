"""Checkpoints of real Megatron models: exact at the same layout, portable to others, current only when complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron_runs import Outcome, assert_same_training, train, train_all
from tiny_models import make_llama
from torch.distributed.checkpoint import FileSystemReader

pytestmark = pytest.mark.slow
EPSILON = {"adam_eps": 1e-5}
LAYOUTS = {
    "tp2_sp": {"tp": 2, "sp": True},
    "pp2_interleaved": {"pp": 2, "vpp": 2},
    "dp2_distributed_optimizer": {"distributed_optimizer": True},
    "cp2_distributed_optimizer": {"cp": 2, "distributed_optimizer": True},
}
STEPS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 groups of heads and 131 tokens: padded at TP 2, not at TP 1, so their tensors differ in length."""
    return make_llama(
        tmp_path_factory.mktemp("student"),
        0,
        tied=True,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=131,
        num_hidden_layers=4,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_is_bit_exact(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    """One step too many after the checkpoint, and back: the rest is bit-identical to the undisturbed run."""
    jobs = {}
    for name, layout in LAYOUTS.items():
        jobs[f"{name}_plain"] = layout | {"dtype": dtype}
        jobs[f"{name}_disturbed"] = layout | {"dtype": dtype, "checkpoint_at": 1, "disturb_at": 1}
    outcomes = train_all(jobs, checkpoint, tmp_path, world_size=2)
    for name in LAYOUTS:
        plain, disturbed = outcomes[f"{name}_plain"], outcomes[f"{name}_disturbed"]
        assert plain.history == disturbed.history, name
        assert all(torch.equal(plain.trained[key], disturbed.trained[key]) for key in plain.trained), name


@pytest.fixture(scope="module")
def uninterrupted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(checkpoint, tmp_path_factory.mktemp("single"), steps=STEPS, training=EPSILON)


def test_resuming_at_another_layout(checkpoint: Path, uninterrupted: Outcome, tmp_path: Path) -> None:
    """One step in each layout, from the checkpoint the layout before left."""
    path = [
        {"tp": 2, "sp": True},  # heads and vocabulary padded
        {"distributed_optimizer": True},  # DP 2, neither padded, state split
        {"pp": 2, "vpp": 2},
        {"tp": 2},
    ]
    jobs = {}
    for step, layout in enumerate(path):
        job = layout | {"training": EPSILON, "first_step": step, "steps": step + 1, "checkpoint_after": True}
        if step:
            job["resume_from"] = str(tmp_path / f"step{step - 1}" / "checkpoints" / f"iter_{step:07d}")
        jobs[f"step{step}"] = job
    outcomes = list(train_all(jobs, checkpoint, tmp_path, world_size=2).values())
    last = outcomes[-1]
    history = [record for outcome in outcomes for record in outcome.history]
    assert_same_training(Outcome(history, last.loaded, last.trained, last.checkpoints), uninterrupted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_writes_and_reads_the_optimizer_state_that_it_holds(
    dtype: str, checkpoint: Path, tmp_path: Path
) -> None:
    """No rank gathers what others hold, to write it or to read its own part of it."""
    layout = {"distributed_optimizer": True, "dtype": dtype, "steps": 1, "checkpoint_after": True}
    outcome = train_all({"": layout}, checkpoint, tmp_path, world_size=2)[""]
    ranks = [json.loads((tmp_path / f"state_{rank}.json").read_text()) for rank in range(2)]
    assert [rank["all_reduces"] for rank in ranks] == [0, 0]
    parameters = sum(tensor.numel() for name, tensor in outcome.trained.items() if name != "lm_head.weight")
    states = 3 if dtype == "bfloat16" else 2
    assert sum(rank["held"] for rank in ranks) == states * parameters
    assert max(rank["held"] for rank in ranks) < 0.55 * states * parameters
    metadata = FileSystemReader(outcome.checkpoints / "iter_0000001").read_metadata()
    written = [0, 0]
    for index, place in metadata.storage_data.items():
        if index.fqn.startswith("optimizer."):
            written[int(place.relative_path.removeprefix("__").split("_")[0])] += place.length
    assert max(written) < 0.6 * sum(written)


def test_the_newest_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    outcome = train(checkpoint, tmp_path, steps=STEPS, checkpoint_every=True)
    left = sorted(entry.name for entry in outcome.checkpoints.iterdir())
    assert left == ["iter_0000002", "iter_0000003", "latest.txt"]
    assert (outcome.checkpoints / "latest.txt").read_text() == "iter_0000003\n"
    for name in left[:2]:  # megatron-core 0.19 writes none; 0.16 to 0.18 load nothing without it
        assert torch.load(outcome.checkpoints / name / "common.pt", weights_only=True) is not None


def test_megatrons_own_writer_is_asked_for_where_there_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """From megatron-core 0.17 on the default needs a package that megatron-core does not require."""
    from megatron_npd.mcore import checkpoint

    def before(state: dict, folder: str, async_sharded_save: bool = False) -> None: ...

    def since(state: dict, folder: str, async_sharded_save: bool = False, async_strategy: str = "nvrx") -> None: ...

    for save, chosen in ((before, {}), (since, {"async_strategy": "mcore"})):
        monkeypatch.setattr(checkpoint.dist_checkpointing, "save", save)
        assert checkpoint._own_writer_of_megatron() == chosen


@pytest.mark.parametrize("fault", ["writer_dies", "writers_child_is_killed"])
def test_a_writer_that_dies_is_an_error_and_leaves_nothing_current(
    fault: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Megatron splits the writing over children of the writer, and would wait for a killed one for ever."""
    with pytest.raises(
        AssertionError, match="a checkpoint could not be written: rank 0: its writing process was killed"
    ):
        train(checkpoint, tmp_path, checkpoint_at=1, fault=fault)
    assert not list((tmp_path / "checkpoints").glob("iter_*"))
    assert not (tmp_path / "checkpoints" / "latest.txt").exists()
