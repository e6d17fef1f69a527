"""Rates of a run in which nothing but tokens takes time."""

from __future__ import annotations

from megatron_npd.estimates.rates import (
    AnnotatorRates,
    LaunchRates,
    Rates,
    RolloutRates,
    SampleRates,
    TrainerRates,
)

INSTANT = 1e15
"""Tokens a second of a role that takes no time."""


def rates(rollout: float = INSTANT, annotator: float = INSTANT, trainer: float = INSTANT) -> Rates:
    """Tokens a second of each role; starts, publications and refreshes take no time."""
    return Rates(
        samples=SampleRates(prompt_tokens=40.0, response_tokens=10.0, kept_share=0.5, kept_tokens=50.0),
        launch=LaunchRates(start_seconds=0.0),
        trainer=TrainerRates(start_seconds=0.0, tokens_per_second=trainer),
        annotator=AnnotatorRates(start_seconds=0.0, tokens_per_second=annotator),
        rollout=RolloutRates(start_seconds=0.0, tokens_per_second=rollout),
        rollout_teacher=RolloutRates(start_seconds=0.0, tokens_per_second=rollout),
    )
