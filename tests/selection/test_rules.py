"""The rules beside Δ-IFD itself: no filter, a random drop of the same size, and τ as a quantile of the round before."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_npd.buffer.plan import lot
from megatron_npd.config import SelectionConfig
from megatron_npd.schema import FinishReason, Verdict
from megatron_npd.selection.delta_ifd import DeltaIfd
from megatron_npd.selection.no_filter import NoFilter
from megatron_npd.selection.random_drop import RandomDrop
from megatron_npd.selection.rule import Nlls, Responses
from megatron_npd.selection.rules import quantile_of, rule_of

N = 400
TAU = 0.3
FILTERED = [Verdict.DEGENERATE, Verdict.COGNITIVE_DISCONNECT]


def samples(seed: int = 0) -> tuple[Responses, Nlls]:
    """Samples of which some are unusable for each reason, and the others on both sides of the filter's bounds."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 9, N)
    finish = generator.choice([FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT], N, p=[0.8, 0.15, 0.05])
    unknown = generator.random(N) < 0.05
    lots = np.array([lot(seed, "round_0000", row, 0) for row in range(N)], np.uint64)
    nlls = generator.uniform(0.1, 2.0, (4, N))
    nlls[0, :5] = np.nan
    return Responses(lengths, finish.astype(np.uint8), unknown, lots), Nlls(*nlls)


def test_no_filter_keeps_what_delta_ifd_keeps_and_what_it_filters() -> None:
    responses, nlls = samples()
    filtered = DeltaIfd("ppl", TAU, True).judge(responses, nlls).verdict
    assert {*FILTERED, Verdict.KEPT} <= set(filtered)
    expected = np.where(np.isin(filtered, FILTERED), Verdict.KEPT, filtered)
    missing = np.full(N, np.nan)
    rule = NoFilter(reject_truncated=True)
    assert not rule.looks_at_scores
    plain = rule.judge(responses, Nlls(nlls.teacher_conditional, missing, missing, missing))
    np.testing.assert_array_equal(plain.verdict, expected)
    assert np.isnan(plain.delta_ifd).all()
    np.testing.assert_array_equal(rule.needs_no_score(responses), DeltaIfd("ppl", TAU, True).needs_no_score(responses))


def test_a_random_drop_keeps_as_many_as_the_filter_and_not_by_score() -> None:
    responses, nlls = samples()
    like = DeltaIfd("ppl", TAU, True)
    filtered, drawn = like.judge(responses, nlls), RandomDrop(like).judge(responses, nlls)
    kept = drawn.verdict == Verdict.KEPT
    assert np.count_nonzero(kept) == np.count_nonzero(filtered.verdict == Verdict.KEPT)
    usable = np.isin(filtered.verdict, [Verdict.KEPT, *FILTERED])
    np.testing.assert_array_equal(drawn.verdict[~usable], filtered.verdict[~usable])
    assert set(drawn.verdict[usable]) == {Verdict.KEPT, Verdict.RANDOM}
    np.testing.assert_array_equal(drawn.delta_ifd, filtered.delta_ifd)
    # Of what the filter rejects, the lot keeps the same share as of what it keeps: 4 standard deviations.
    rejected = np.isin(filtered.verdict, FILTERED)
    share, n = np.count_nonzero(kept) / np.count_nonzero(usable), np.count_nonzero(rejected)
    assert abs(np.count_nonzero(kept & rejected) - n * share) < 4 * np.sqrt(n * share * (1 - share))


def test_lots_are_of_the_identity_not_of_the_order() -> None:
    responses, nlls = samples()
    rule = RandomDrop(DeltaIfd("ppl", TAU, True))
    order = np.random.default_rng(3).permutation(N)
    turned = rule.judge(
        Responses(*(column[order] for column in (responses.lengths, responses.finish_reasons,
                                                responses.out_of_vocabulary, responses.lots))),
        Nlls(*(column[order] for column in (nlls.teacher_conditional, nlls.teacher_unconditional,
                                            nlls.student_conditional, nlls.student_unconditional))),
    )  # fmt: skip
    np.testing.assert_array_equal(turned.verdict, rule.judge(responses, nlls).verdict[order])
    other_seed = [lot(1, "round_0000", row, 0) for row in range(N)]
    assert other_seed != responses.lots.tolist() and len(set(other_seed)) == N


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9, 1.0])
def test_tau_as_a_quantile_keeps_that_share_of_what_is_learnable(quantile: float) -> None:
    deltas = np.concatenate([np.random.default_rng(1).normal(0.1, 0.5, 1000), [np.nan, np.inf, -np.inf]])
    tau = quantile_of(deltas, quantile)
    learnable = deltas[np.isfinite(deltas) & (deltas >= 0)]
    assert tau in learnable
    assert np.count_nonzero(learnable <= tau) == np.ceil(quantile * len(learnable))


def test_the_first_round_takes_tau_itself() -> None:
    config = SelectionConfig(tau=0.7, tau_quantile=0.5)
    later = np.array([0.1, 0.2, 0.3, -1.0])
    assert rule_of(config).describe()["tau"] == 0.7
    assert rule_of(config, later).describe()["tau"] == 0.2
    assert rule_of(SelectionConfig(tau=0.7), later).describe()["tau"] == 0.7
    like = rule_of(SelectionConfig(rule="random", tau_quantile=0.5), later).describe()
    assert (like["rule"], like["like"]["tau"], like["band"]) == ("random", 0.2, None)
    assert rule_of(SelectionConfig(rule="none")).describe()["rule"] == "none"


def test_a_round_without_any_learnable_sample_says_so() -> None:
    with pytest.raises(ValueError, match="none of the 2 samples of the round before has Δ-IFD ≥ 0"):
        quantile_of(np.array([-1.0, np.nan]), 0.5)
