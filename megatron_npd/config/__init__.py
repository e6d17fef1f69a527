"""The configuration of a run: its tables and keys, with their defaults and rules. Imported from here."""

from megatron_npd.config.evaluation import HELDOUT_KL, EvaluationConfig
from megatron_npd.config.inputs import ColumnsConfig, HeldoutConfig, PromptsConfig
from megatron_npd.config.run import (
    Config,
    LaunchConfig,
    RolloutConfig,
    SelectionConfig,
    TrainingConfig,
    apply_override,
    load_config,
    make_config,
    validated,
)
from megatron_npd.config.section import Section
from megatron_npd.config.slurm import SlurmConfig, SlurmRoleConfig

__all__ = [
    "HELDOUT_KL",
    "ColumnsConfig",
    "Config",
    "EvaluationConfig",
    "HeldoutConfig",
    "LaunchConfig",
    "PromptsConfig",
    "RolloutConfig",
    "Section",
    "SelectionConfig",
    "SlurmConfig",
    "SlurmRoleConfig",
    "TrainingConfig",
    "apply_override",
    "load_config",
    "make_config",
    "validated",
]
