"""Δ-IFD: which samples are learnable. Pure numpy, float64 throughout.

For a model m, prompt x and response y, with NLLs that are means over the same response tokens (nats a token):

    IFD_m(x, y) = exp(NLL_m(y|x)) / exp(NLL_m(y))     form "ppl"  (Superfiltering, arXiv 2402.00530)
                  NLL_m(y|x) / NLL_m(y)               form "loss" (Cherry LLM, arXiv 2308.12032)
    Δ-IFD(x, y) = IFD_teacher(x, y) - IFD_student(x, y)

    Δ < 0           degenerate: the student is less sure of its own sample than the teacher
    0 ≤ Δ ≤ τ       learnable: kept, both ends included
    Δ > τ           cognitive disconnect: beyond the student's reach

τ of one form means nothing in the other. A sample that τ rejects keeps its scores: τ is tuned from them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from megatron_npd.schema import FinishReason, Verdict
from megatron_npd.selection.rule import Judgement, Nlls, Responses

IfdForm = Literal["ppl", "loss"]


@dataclass(frozen=True)
class DeltaIfd:
    """The rule of the paper: 0 ≤ Δ-IFD ≤ τ; see `judge`."""

    looks_at_scores: ClassVar[bool] = True
    form: IfdForm
    tau: float
    reject_truncated: bool

    def needs_no_score(self, responses: Responses) -> np.ndarray:
        reasons = rejections_without_scores(
            responses.lengths, responses.finish_reasons, responses.out_of_vocabulary, self.reject_truncated
        )
        return np.logical_or.reduce([applies for _, applies in reasons])

    def judge(self, responses: Responses, nlls: Nlls, by_delta: bool = True) -> Judgement:
        return judge(
            nlls.teacher_conditional,
            nlls.teacher_unconditional,
            nlls.student_conditional,
            nlls.student_unconditional,
            responses.lengths,
            responses.finish_reasons,
            responses.out_of_vocabulary,
            form=self.form,
            tau=self.tau,
            reject_truncated=self.reject_truncated,
            by_delta=by_delta and not responses.by_teacher,
        )

    def describe(self) -> dict[str, Any]:
        return {
            "rule": "delta_ifd",
            **asdict(self),
            "keeps": f"0 to τ = {self.tau:g} ({self.form} form)",
            "band": [0.0, self.tau],
        }


def ifd(nll_conditional: np.ndarray, nll_unconditional: np.ndarray, form: IfdForm) -> np.ndarray:
    """IFD of samples, float64 [N].

    Args:
        nll_conditional: NLL_m(y|x), [N], nats a token.
        nll_unconditional: NLL_m(y), [N], over the same tokens.
        form: "ppl" is exp(NLL_m(y|x) - NLL_m(y)), which overflows only where the ratio itself does; "loss" is
            NLL_m(y|x) / NLL_m(y).

    A NaN or infinite NLL gives NaN (not the 0 that exp(-inf) or x / inf would); a ratio too large for float64, or
    one over 0, gives inf or NaN.

    Raises:
        ValueError: another form.
    """
    conditional = np.asarray(nll_conditional, dtype=np.float64)
    unconditional = np.asarray(nll_unconditional, dtype=np.float64)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if form == "ppl":
            ratio = np.exp(conditional - unconditional)
        elif form == "loss":
            ratio = conditional / unconditional
        else:
            raise ValueError(f"form = {form!r}: must be 'ppl' or 'loss'")
    return np.where(np.isfinite(conditional) & np.isfinite(unconditional), ratio, np.nan)


def rejections_without_scores(
    response_lengths: np.ndarray, finish_reasons: np.ndarray, out_of_vocabulary: np.ndarray, reject_truncated: bool
) -> list[tuple[Verdict, np.ndarray]]:
    """(verdict, bool [N] whether it applies) of the reasons that need no score, by precedence; see `judge`."""
    finish = np.asarray(finish_reasons)
    return [
        (Verdict.ABORTED, finish == FinishReason.ABORT),
        (Verdict.OUT_OF_VOCABULARY, np.asarray(out_of_vocabulary, dtype=bool)),
        (Verdict.EMPTY, np.asarray(response_lengths) <= 0),
        (Verdict.TRUNCATED, (finish == FinishReason.LENGTH) & reject_truncated),
    ]


def judge(
    nll_teacher_conditional: np.ndarray,
    nll_teacher_unconditional: np.ndarray,
    nll_student_conditional: np.ndarray,
    nll_student_unconditional: np.ndarray,
    response_lengths: np.ndarray,
    finish_reasons: np.ndarray,
    out_of_vocabulary: np.ndarray,
    *,
    form: IfdForm,
    tau: float,
    reject_truncated: bool,
    by_delta: bool = True,
) -> Judgement:
    """Score N samples and say of each whether it is trained on.

    A sample has one verdict, the first that applies of

        ABORTED               finish_reasons is ABORT
        OUT_OF_VOCABULARY     out_of_vocabulary
        EMPTY                 response_lengths is 0
        TRUNCATED             finish_reasons is LENGTH, and reject_truncated
        NON_FINITE            Δ is NaN or infinite
        DEGENERATE            Δ < 0
        COGNITIVE_DISCONNECT  Δ > τ
        KEPT

    The first four need no score, and may have none, so they explain a NaN and come before NON_FINITE; what is left of
    NON_FINITE is a fault of the numerics.

    Args:
        nll_teacher_conditional: NLLs, [N], nats a token, mean over the response tokens; so are the other three.
        response_lengths: int [N], tokens of content: the end token does not count, so that a response of the end
            token alone has length 0 and is EMPTY.
        finish_reasons: uint8 [N], `schema.FinishReason`.
        out_of_vocabulary: bool [N], whether an id is unknown to one of the models.
        tau: largest Δ-IFD that is kept.
        by_delta: False for the teacher's own responses, which are trained on unfiltered: no student scores them and
            no unconditional pass is made, those NLLs are NaN by design, and so is Δ. NON_FINITE is then about
            nll_teacher_conditional alone.

    Raises:
        ValueError: inputs of different lengths, or an unknown form.
    """
    inputs = (
        nll_teacher_conditional,
        nll_teacher_unconditional,
        nll_student_conditional,
        nll_student_unconditional,
        response_lengths,
        finish_reasons,
        out_of_vocabulary,
    )
    if len({np.shape(column) for column in inputs}) != 1 or np.ndim(response_lengths) != 1:
        raise ValueError(f"inputs must all be [N], got shapes {[np.shape(column) for column in inputs]}")

    teacher = ifd(nll_teacher_conditional, nll_teacher_unconditional, form)
    student = ifd(nll_student_conditional, nll_student_unconditional, form)
    with np.errstate(invalid="ignore"):
        delta = teacher - student
    scored = np.isfinite(delta if by_delta else np.asarray(nll_teacher_conditional, dtype=np.float64))

    reasons = rejections_without_scores(response_lengths, finish_reasons, out_of_vocabulary, reject_truncated)
    reasons.append((Verdict.NON_FINITE, ~scored))
    if by_delta:
        reasons += [(Verdict.DEGENERATE, delta < 0.0), (Verdict.COGNITIVE_DISCONNECT, ~(delta <= tau))]
    verdict = np.select(
        [applies for _, applies in reasons],
        [np.uint8(reason) for reason, _ in reasons],
        default=np.uint8(Verdict.KEPT),
    )
    return Judgement(teacher, student, delta, verdict.astype(np.uint8))
