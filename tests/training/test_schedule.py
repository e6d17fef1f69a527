"""The plan of training is a function of seed, stage and the kept samples alone; its steps are dealt out evenly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_npd.models.cost import CostModel
from megatron_npd.training.schedule import deal, imbalance, learning_rate, plan_steps

IDENTITIES = np.stack([np.arange(50) // 2, np.arange(50) % 2], 1)
LENGTHS = np.random.default_rng(0).integers(5, 60, 50)
SETTINGS = {"epochs": 3, "capacity": 128, "global_batch_size": 4, "cost": CostModel(100.0, 1.0)}


def visited(
    identities: np.ndarray, lengths: np.ndarray, seed: int = 1, stage: str = "round_0000", **changes: object
) -> list:
    """Identities step by step, pack by pack."""
    steps = plan_steps(seed, stage, identities, lengths, **(SETTINGS | changes))
    return [[[tuple(identities[item].tolist()) for item in items] for items in step.packs] for step in steps]


# --- steps ---


def test_every_epoch_visits_every_sample_once() -> None:
    steps = plan_steps(1, "round_0000", IDENTITIES, LENGTHS, **SETTINGS)
    for epoch in range(3):
        items = [item for step in steps if step.epoch == epoch for pack in step.packs for item in pack]
        assert sorted(items) == list(range(50))
    assert all(1 <= len(step.packs) <= 4 for step in steps)
    assert all(LENGTHS[pack].sum() <= 128 for step in steps for pack in step.packs)
    assert steps[-1].progress == 1.0


@given(st.randoms(use_true_random=False), st.sampled_from([1, 4, 8]), st.booleans())
def test_arrival_order_does_not_matter(random, alignment: int, ties: bool) -> None:
    lengths = np.where(LENGTHS < 30, 12, 40) if ties else LENGTHS  # two lengths: packing meets ties all the time
    arrival = np.array(random.sample(range(50), 50))
    assert visited(IDENTITIES, lengths, alignment=alignment) == visited(
        IDENTITIES[arrival], lengths[arrival], alignment=alignment
    )


def test_seed_stage_and_epoch_matter() -> None:
    plan = visited(IDENTITIES, LENGTHS)
    assert plan != visited(IDENTITIES, LENGTHS, seed=2)
    assert plan != visited(IDENTITIES, LENGTHS, stage="round_0001")
    assert plan[: len(plan) // 3] != plan[len(plan) // 3 : 2 * len(plan) // 3]


def test_samples_of_equal_length_meet_others_in_every_epoch() -> None:
    plan = visited(IDENTITIES, np.full(50, 40), epochs=2, global_batch_size=100)
    first, second = ({frozenset(pack) for pack in step} for step in plan)
    assert len(first & second) < 3


@pytest.mark.parametrize("alignment", [2, 8, 16])
def test_packs_have_room_for_aligned_samples(alignment: int) -> None:
    steps = plan_steps(1, "round_0000", IDENTITIES, LENGTHS, **SETTINGS, alignment=alignment)
    for step in steps:
        for pack in step.packs:
            assert sum(-(-int(LENGTHS[item]) // alignment) * alignment for item in pack) <= 128


def test_a_sample_that_fits_only_unaligned_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity is 128"):
        plan_steps(1, "s", IDENTITIES[:1], np.array([129]), **SETTINGS, alignment=8)


# --- dealing ---


@given(
    st.lists(st.floats(0, 1e15), max_size=40),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_every_rank_has_the_same_number_and_every_pack_is_dealt_once(
    costs: list[float], ranks: int, multiple_of: int
) -> None:
    packs = [[number] for number in range(len(costs))]
    shares = deal(packs, costs, ranks, multiple_of)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) % multiple_of == 0
    assert len(shares[0]) < len(costs) / ranks + multiple_of  # no more than needed
    assert sorted(item for share in shares for pack in share for item in pack) == list(range(len(costs)))
    assert shares == deal(packs, costs, ranks, multiple_of)
    for share in shares:
        of_share = [costs[pack[0]] if pack else -1.0 for pack in share]
        assert of_share == sorted(of_share, reverse=True)  # dearest first, empty ones last


def test_costs_are_dealt_evenly() -> None:
    costs = np.random.default_rng(0).uniform(1, 2.5, 64).tolist()
    for ranks in (2, 4, 8):
        shares = deal([[number] for number in range(64)], costs, ranks)
        assert imbalance([sum(costs[pack[0]] for pack in share) for share in shares]) < 1.02
        in_order = [sum(costs[rank::ranks]) for rank in range(ranks)]
        assert imbalance(in_order) > 1.02


def test_the_example_that_greed_gets_right() -> None:
    assert deal([[0], [1], [2], [3]], [1.0, 4.0, 2.0, 3.0], 2) == [[[1], [0]], [[3], [2]]]


def test_ranks_are_filled_up_with_empty_packs() -> None:
    shares = deal([[5], [6], [7]], [3.0, 1.0, 1.0], 2, 4)
    assert shares == [[[5], [], [], []], [[6], [7], [], []]]
    shares[0][1].append(9)  # empty packs are lists of their own
    assert shares[0][2] == []


def test_equal_costs_are_spread_over_all_ranks() -> None:
    assert deal([[0], [1], [2]], [0.0, 0.0, 0.0], 3, 2) == [[[0], []], [[1], []], [[2], []]]


def test_imbalance() -> None:
    assert imbalance([2.0, 2.0]) == 1.0
    assert imbalance([3.0, 1.0]) == 1.5
    assert imbalance([0.0, 0.0]) == 1.0


# --- learning rate ---


def test_learning_rate_rises_then_follows_a_cosine() -> None:
    assert learning_rate(0.05, 1.0, 0.1, 0.1) == pytest.approx(0.5)
    assert learning_rate(0.1, 1.0, 0.1, 0.1) == pytest.approx(1.0)
    assert learning_rate(0.55, 1.0, 0.1, 0.1) == pytest.approx(0.55)
    assert learning_rate(1.0, 1.0, 0.1, 0.1) == pytest.approx(0.1)
