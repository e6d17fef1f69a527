"""The plan of training is a function of seed, stage and the kept samples alone."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_npd.training.schedule import learning_rate, plan_steps, share_of_rank

IDENTITIES = np.stack([np.arange(50) // 2, np.arange(50) % 2], 1)
LENGTHS = np.random.default_rng(0).integers(5, 60, 50)
SETTINGS = {"epochs": 3, "capacity": 128, "global_batch_size": 4}


def visited(identities: np.ndarray, lengths: np.ndarray, seed: int = 1, stage: str = "round_0000") -> list:
    """Identities step by step, pack by pack."""
    steps = plan_steps(seed, stage, identities, lengths, **SETTINGS)
    return [[[tuple(identities[item]) for item in items] for items in step.packs] for step in steps]


def test_every_epoch_visits_every_sample_once() -> None:
    steps = plan_steps(1, "round_0000", IDENTITIES, LENGTHS, **SETTINGS)
    for epoch in range(3):
        items = [item for step in steps if step.epoch == epoch for pack in step.packs for item in pack]
        assert sorted(items) == list(range(50))
    assert all(1 <= len(step.packs) <= 4 for step in steps)
    assert steps[-1].progress == 1.0


def test_arrival_order_does_not_matter() -> None:
    arrival = np.random.default_rng(5).permutation(50)
    assert visited(IDENTITIES, LENGTHS) == visited(IDENTITIES[arrival], LENGTHS[arrival])


def test_seed_stage_and_epoch_matter() -> None:
    plan = visited(IDENTITIES, LENGTHS)
    assert plan != visited(IDENTITIES, LENGTHS, seed=2)
    assert plan != visited(IDENTITIES, LENGTHS, stage="round_0001")
    assert plan[: len(plan) // 3] != plan[len(plan) // 3 : 2 * len(plan) // 3]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_a_step_whatever_their_number(size: int) -> None:
    packs = [[0], [1], [2], [3], [4]]
    shares = [list(share_of_rank(packs, rank, size)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1  # the same number of micro-batches everywhere
    assert sorted(item for share in shares for items in share for item in items) == [0, 1, 2, 3, 4]


def test_learning_rate_rises_then_follows_a_cosine() -> None:
    assert learning_rate(0.05, 1.0, 0.1, 0.1) == pytest.approx(0.5)
    assert learning_rate(0.1, 1.0, 0.1, 0.1) == pytest.approx(1.0)
    assert learning_rate(0.55, 1.0, 0.1, 0.1) == pytest.approx(0.55)
    assert learning_rate(1.0, 1.0, 0.1, 0.1) == pytest.approx(0.1)
