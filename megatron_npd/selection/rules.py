"""The selection rules there are, and which one a configuration means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_npd.config import SelectionConfig
from megatron_npd.selection.delta_ifd import DeltaIfd
from megatron_npd.selection.no_filter import NoFilter
from megatron_npd.selection.random_drop import RandomDrop
from megatron_npd.selection.rule import SelectionRule


def rule_of(config: SelectionConfig, earlier_deltas: np.ndarray | None = None) -> SelectionRule:
    """The rule that a configuration means for a round.

    Args:
        earlier_deltas: Δ-IFD of every sample of the round before, float64 [N], NaN where there is none; None: this is
            the first round. What `selection.tau_quantile` is taken of.

    Raises:
        ValueError: the round before has no sample to take a quantile of.
    """
    if config.rule == "none":
        return NoFilter(config.reject_truncated)
    rule = DeltaIfd(config.form, config.tau, config.reject_truncated)
    if config.tau_quantile and earlier_deltas is not None:
        rule = replace(rule, tau=quantile_of(earlier_deltas, config.tau_quantile))
    return rule if config.rule == "delta_ifd" else RandomDrop(rule)


def quantile_of(deltas: np.ndarray, quantile: float) -> float:
    """The smallest of the Δ-IFD ≥ 0 that at least this share of them does not exceed: one that occurred.

    Raises:
        ValueError: there is none.
    """
    learnable = deltas[np.isfinite(deltas) & (deltas >= 0.0)]
    if not len(learnable):
        raise ValueError(
            f"selection.tau_quantile = {quantile}: none of the {len(deltas)} samples of the round before has Δ-IFD ≥ 0"
        )
    return float(np.quantile(learnable, quantile, method="inverted_cdf"))
