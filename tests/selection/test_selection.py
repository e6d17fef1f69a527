"""Δ-IFD: zones, edges, reasons and their precedence, against a direct transcription of the formulae."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from megatron_npd.schema import FinishReason, Verdict
from megatron_npd.selection.delta_ifd import ifd, judge
from megatron_npd.selection.rule import Judgement

NLLS = (
    "nll_teacher_conditional",
    "nll_teacher_unconditional",
    "nll_student_conditional",
    "nll_student_unconditional",
)


def judged(samples: int = 1, **changes: Any) -> Judgement:
    """Judge samples that would be kept (Δ = exp(-0.5) - exp(-1) = 0.239), but for what is changed."""
    given: dict[str, Any] = dict(zip(NLLS, (1.5, 2.0, 1.0, 2.0), strict=True))
    given |= {"response_lengths": 7, "finish_reasons": FinishReason.STOP, "out_of_vocabulary": False}
    options = {"form": "ppl", "tau": 0.8, "reject_truncated": True}
    for name, value in changes.items():
        (given if name in given else options)[name] = value
    columns = {name: np.broadcast_to(np.asarray(value), (samples,)) for name, value in given.items()}
    return judge(**columns, **options)


def verdict(**changes: Any) -> Verdict:
    """Verdict of one sample."""
    return Verdict(int(judged(**changes).verdict[0]))


@pytest.mark.parametrize("form", ["ppl", "loss"])
def test_agrees_with_the_formulae(form: str) -> None:
    generator = np.random.default_rng(5)
    nlls = generator.uniform(0.05, 6.0, (4, 500))
    result = judged(500, form=form, tau=0.3, **dict(zip(NLLS, nlls, strict=True)))
    for i in range(500):
        tc, tu, sc, su = (float(column[i]) for column in nlls)
        if form == "ppl":
            teacher, student = math.exp(tc) / math.exp(tu), math.exp(sc) / math.exp(su)
        else:
            teacher, student = tc / tu, sc / su
        delta = teacher - student
        expected = Verdict.DEGENERATE if delta < 0 else Verdict.COGNITIVE_DISCONNECT if delta > 0.3 else Verdict.KEPT
        assert result.ifd_teacher[i] == pytest.approx(teacher, rel=1e-13)
        assert result.ifd_student[i] == pytest.approx(student, rel=1e-13)
        assert result.delta_ifd[i] == pytest.approx(delta, rel=1e-9, abs=1e-11)
        assert result.verdict[i] == expected
    assert {int(v) for v in result.verdict} == {0, 1, 2}
    assert result.delta_ifd.dtype == result.ifd_teacher.dtype == result.ifd_student.dtype == np.float64
    assert result.verdict.dtype == np.uint8


def test_zones_include_both_ends() -> None:
    """Loss form with a student IFD of 1/4, so that Δ is exact in binary."""
    for teacher, expected in [
        (0.25, Verdict.KEPT),  # Δ = 0
        (np.nextafter(0.25, 0), Verdict.DEGENERATE),
        (0.75, Verdict.KEPT),  # Δ = τ
        (np.nextafter(0.75, 1), Verdict.COGNITIVE_DISCONNECT),
        (0.5, Verdict.KEPT),
        (5.0, Verdict.COGNITIVE_DISCONNECT),
    ]:
        student = {"nll_student_conditional": 0.25, "nll_student_unconditional": 1.0}
        found = verdict(form="loss", tau=0.5, nll_teacher_conditional=teacher, nll_teacher_unconditional=1.0, **student)
        assert found is expected, teacher


@pytest.mark.parametrize("form", ["ppl", "loss"])
def test_a_teacher_equal_to_the_student_scores_exactly_zero(form: str) -> None:
    conditional, unconditional = np.random.default_rng(0).uniform(0.01, 12.0, (2, 1000))
    result = judged(1000, form=form, **dict(zip(NLLS, (conditional, unconditional) * 2, strict=True)))
    assert np.all(result.delta_ifd == 0.0)
    assert np.all(result.verdict == Verdict.KEPT)


@pytest.mark.parametrize("form", ["ppl", "loss"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NLLS)
def test_a_non_finite_nll_is_rejected_and_never_becomes_a_number(name: str, value: float, form: str) -> None:
    result = judged(form=form, **{name: value})
    assert result.verdict[0] == Verdict.NON_FINITE
    assert np.isnan(result.delta_ifd[0])
    other = result.ifd_student if "teacher" in name else result.ifd_teacher
    assert np.isfinite(other[0]), "the other model's score is kept"


def test_overflow_and_division_by_zero_are_non_finite() -> None:
    assert verdict(nll_teacher_conditional=800.0) is Verdict.NON_FINITE
    assert verdict(form="loss", nll_teacher_unconditional=0.0) is Verdict.NON_FINITE
    assert verdict(form="loss", nll_student_conditional=0.0, nll_student_unconditional=0.0) is Verdict.NON_FINITE


def test_ppl_form_is_stable_where_the_perplexities_overflow() -> None:
    assert ifd(np.array([1000.0]), np.array([1000.5]), "ppl")[0] == pytest.approx(math.exp(-0.5))


def test_each_reason() -> None:
    assert verdict() is Verdict.KEPT
    assert verdict(nll_teacher_conditional=0.9) is Verdict.DEGENERATE
    assert verdict(nll_teacher_conditional=3.0) is Verdict.COGNITIVE_DISCONNECT
    assert verdict(response_lengths=0) is Verdict.EMPTY
    assert verdict(finish_reasons=FinishReason.LENGTH) is Verdict.TRUNCATED
    assert verdict(finish_reasons=FinishReason.LENGTH, reject_truncated=False) is Verdict.KEPT
    assert verdict(finish_reasons=FinishReason.ABORT) is Verdict.ABORTED
    assert verdict(out_of_vocabulary=True) is Verdict.OUT_OF_VOCABULARY


def test_precedence() -> None:
    """Take away the winning fault each time: the next one shows."""
    faults: list[tuple[Verdict, dict[str, Any], dict[str, Any]]] = [
        (Verdict.ABORTED, {"finish_reasons": FinishReason.ABORT}, {"finish_reasons": FinishReason.LENGTH}),
        (Verdict.OUT_OF_VOCABULARY, {"out_of_vocabulary": True}, {"out_of_vocabulary": False}),
        (Verdict.EMPTY, {"response_lengths": 0}, {"response_lengths": 3}),
        (Verdict.TRUNCATED, {}, {"finish_reasons": FinishReason.STOP}),
        (Verdict.NON_FINITE, {"nll_student_conditional": np.nan}, {"nll_student_conditional": 1.0}),
        (Verdict.DEGENERATE, {"nll_teacher_conditional": 0.1}, {"nll_teacher_conditional": 4.0}),
        (Verdict.COGNITIVE_DISCONNECT, {}, {"nll_teacher_conditional": 1.5}),
    ]
    state: dict[str, Any] = {}
    for _, with_fault, _ in reversed(faults):
        state |= with_fault
    for expected, _, without_fault in faults:
        assert verdict(**state) is expected
        state |= without_fault
    assert verdict(**state) is Verdict.KEPT


def test_rejected_samples_keep_their_scores() -> None:
    kept = judged()
    for change in (
        {"response_lengths": 0},
        {"finish_reasons": FinishReason.LENGTH},
        {"finish_reasons": FinishReason.ABORT},
        {"out_of_vocabulary": True},
        {"tau": 0.1},
    ):
        rejected = judged(**change)
        assert rejected.verdict[0] != Verdict.KEPT
        for name in ("ifd_teacher", "ifd_student", "delta_ifd"):
            np.testing.assert_array_equal(getattr(rejected, name), getattr(kept, name))


def test_warmup_ignores_the_student_and_the_zones() -> None:
    """The annotator makes one pass over the teacher's own responses: three of the four NLLs are NaN by design."""
    not_scored = dict.fromkeys(NLLS[1:], np.nan)
    result = judged(by_delta=False, tau=-1.0, **not_scored)
    assert result.verdict[0] == Verdict.KEPT
    assert np.isnan([result.ifd_teacher[0], result.ifd_student[0], result.delta_ifd[0]]).all()
    for expected, change in (
        (Verdict.NON_FINITE, {"nll_teacher_conditional": np.inf}),
        (Verdict.NON_FINITE, {"nll_teacher_conditional": np.nan}),
        (Verdict.EMPTY, {"response_lengths": 0}),
        (Verdict.TRUNCATED, {"finish_reasons": FinishReason.LENGTH}),
        (Verdict.ABORTED, {"finish_reasons": FinishReason.ABORT}),
        (Verdict.OUT_OF_VOCABULARY, {"out_of_vocabulary": True}),
    ):
        assert verdict(by_delta=False, **not_scored | change) is expected


def test_a_tau_that_is_no_number_keeps_nothing() -> None:
    assert verdict(tau=math.nan) is Verdict.COGNITIVE_DISCONNECT


def test_no_samples() -> None:
    result = judged(0)
    assert result.verdict.shape == result.delta_ifd.shape == (0,)
    assert result.verdict.dtype == np.uint8


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 'ppl' or 'loss'"):
        judged(form="perplexity")
    with pytest.raises(ValueError, match=r"must all be \[N\]"):
        judge(*[np.ones(3)] * 6, np.zeros(2, dtype=bool), form="ppl", tau=0.8, reject_truncated=True)
