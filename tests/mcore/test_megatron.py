"""Real Megatron-Core in several processes: the same training whatever the layout, the packing and the chunking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron_runs import Outcome, assert_same_training, train, train_all
from safetensors.torch import load_file
from tiny_models import make_llama, make_model

pytestmark = pytest.mark.slow

EPSILON = {"adam_eps": 1e-5}
"""Smooth in the gradient: see `assert_same_training`."""

LAYOUTS = {
    1: {
        "packs_of_one": {"samples_per_pack": 1},
        "balanced_packs": {"packing": "balanced"},
        "chunked_logits": {"training": {"logits_chunk_tokens": 7}},
        "recompute_full": {"training": {"recompute": "full"}},
        "recompute_block": {"training": {"recompute": "block", "recompute_layers": 1}},
        "recompute_selective": {"training": {"recompute": "selective"}},
    },
    2: {
        "tp2": {"tp": 2},
        "tp2_sp": {"tp": 2, "sp": True},
        "pp2": {"pp": 2},
        "pp2_interleaved": {"pp": 2, "vpp": 2},
        "dp2": {},
        "dp2_distributed_optimizer": {"distributed_optimizer": True},
        "cp2": {"cp": 2},
        "cp2_distributed_optimizer": {"cp": 2, "distributed_optimizer": True, "samples_per_pack": 2},
        "tp2_sp_recompute": {"tp": 2, "sp": True, "training": {"recompute": "full", "logits_chunk_tokens": 16}},
    },
    4: {
        "tp4": {"tp": 4},
        "tp2_pp2_sp": {"tp": 2, "pp": 2, "sp": True},
        "cp2_tp2_sp": {"cp": 2, "tp": 2, "sp": True},
        "pp2_interleaved_dp2_distributed_optimizer": {"pp": 2, "vpp": 2, "distributed_optimizer": True},
        "dp2_cp2": {"cp": 2, "distributed_optimizer": True},
    },
}


def with_epsilon(jobs: dict[str, dict]) -> dict[str, dict]:
    return {name: job | {"training": EPSILON | job.get("training", {})} for name, job in jobs.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 heads in 3 groups and 131 tokens: at TP 2 and 4 both heads and vocabulary are padded."""
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


@pytest.fixture(scope="module")
def single(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process: what every layout must reproduce."""
    return train(checkpoint, tmp_path_factory.mktemp("single"), training=EPSILON)


@pytest.fixture(scope="module")
def outcomes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every layout's training run, those of one world size in the same processes."""
    everything: dict[str, Outcome] = {}
    for world_size, jobs in LAYOUTS.items():
        out = tmp_path_factory.mktemp(f"world{world_size}")
        everything |= train_all(with_epsilon(jobs), checkpoint, out, world_size)
    return everything


@pytest.mark.parametrize("layout", [name for jobs in LAYOUTS.values() for name in jobs])
def test_same_training_in_every_layout(
    layout: str, outcomes: dict[str, Outcome], checkpoint: Path, single: Outcome
) -> None:
    original = load_file(checkpoint / "model.safetensors")
    loaded = outcomes[layout].loaded
    assert set(loaded) == set(original)
    assert all(torch.equal(loaded[name], original[name]) for name in original)  # bit-exact round trip
    assert_same_training(outcomes[layout], single)


def test_norms_shared_by_heads_train_the_same_when_heads_are_split(tmp_path: Path) -> None:
    """Qwen3's query and key norms: every tensor-parallel rank sees a part of their gradient."""
    checkpoint = make_model("qwen3", tmp_path / "qwen3", 0, num_hidden_layers=2)
    reference = train(checkpoint, tmp_path / "single", training=EPSILON)
    jobs = with_epsilon({"tp2": {"tp": 2}, "tp2_sp": {"tp": 2, "sp": True}})
    for outcome in train_all(jobs, checkpoint, tmp_path / "split", world_size=2).values():
        assert_same_training(outcome, reference)


def test_known_fault_mean_of_micro_batch_means(checkpoint: Path, single: Outcome, tmp_path: Path) -> None:
    """With each micro-batch normalised by its own tokens, the comparison of packings above must fail."""
    faulty = {"fault": "mean_of_micro_batch_means"}
    jobs = with_epsilon({"packs_of_three": faulty, "packs_of_one": faulty | {"samples_per_pack": 1}})
    outcomes = train_all(jobs, checkpoint, tmp_path)
    for outcome in outcomes.values():
        with pytest.raises(AssertionError, match="norm of step 0"):
            assert_same_training(outcome, single)
    norms = [outcome.history[0]["norm"] for outcome in outcomes.values()]
    assert abs(norms[0] / norms[1] - 1) > 0.01, "the fault makes training depend on how samples are packed"
