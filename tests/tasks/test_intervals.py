"""The Wilson interval, against values from the literature and against its definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_npd.tasks.intervals import Z_95, in_words, wilson


@pytest.mark.parametrize(
    ("correct", "count", "expected"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_known_values(correct: int, count: int, expected: tuple[float, float]) -> None:
    assert wilson(correct, count) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_its_ends_are_the_shares_from_which_the_result_is_z_deviations_away(trial: tuple[int, int]) -> None:
    correct, count = trial
    share = correct / count
    for end in wilson(correct, count):
        assert abs(share - end) == pytest.approx(Z_95 * math.sqrt(end * (1 - end) / count), abs=1e-9)
    low, high = wilson(correct, count)
    mirrored = wilson(count - correct, count)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12) and 0 <= low <= share <= high <= 1


def test_without_a_trial_everything_is_possible() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_in_words() -> None:
    result = {"correct": 412, "samples": 500, "accuracy": 412 / 500, "wilson_95": wilson(412, 500)}
    assert in_words(result) == "412/500 = 82.4 % (95 % Wilson 78.8 to 85.5)"
