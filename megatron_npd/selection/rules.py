"""The selection rules there are, and which one a configuration means."""

from __future__ import annotations

from megatron_npd.config import SelectionConfig
from megatron_npd.selection.delta_ifd import DeltaIfd
from megatron_npd.selection.rule import SelectionRule


def rule_of(config: SelectionConfig) -> SelectionRule:
    """The rule of a configuration."""
    return DeltaIfd(config.form, config.tau, config.reject_truncated)
