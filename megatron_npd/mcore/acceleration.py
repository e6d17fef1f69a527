"""Optional GPU parts behind switches: found, announced in the log, and refused when asked for but missing.

    transformer_engine             Transformer Engine's layers (package transformer_engine)
    fused_optimizer                FusedAdam of Transformer Engine, else of NVIDIA apex
    gradient_accumulation_fusion   weight gradients added inside the GEMM (NVIDIA apex's fused_weight_gradient_mlp_cuda)

NVIDIA apex is built from its own source. The PyPI project named `apex` is an unrelated web toolkit and never counts.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_npd.config import TrainingConfig
from megatron_npd.errors import UserError

logger = logging.getLogger(__name__)
Obstacle = str | None
"""Why a part cannot run here."""


@dataclass(frozen=True)
class Acceleration:
    """Which optional parts this process uses."""

    transformer_engine: bool = False
    fused_optimizer: bool = False
    gradient_accumulation_fusion: bool = False


NONE = Acceleration()


def choose_acceleration(config: TrainingConfig) -> Acceleration:
    """What the configuration asks for, with "auto" replaced by what can run here; says so in the log.

    Raises:
        UserError: a part is "on" but cannot run here; the text says why.
    """
    return Acceleration(
        _chosen(config, "transformer_engine", transformer_engine_obstacle()),
        _chosen(config, "fused_optimizer", _fused_optimizer_obstacle()),
        _chosen(config, "gradient_accumulation_fusion", _fusion_obstacle()),
    )


def choose_layers(config: TrainingConfig) -> Acceleration:
    """The same for a model that is not trained: its layers alone. Raises as `choose_acceleration` does."""
    return Acceleration(_chosen(config, "transformer_engine", transformer_engine_obstacle()))


def _chosen(config: TrainingConfig, name: str, obstacle: Obstacle) -> bool:
    wanted = getattr(config, name)
    if wanted == "on" and obstacle:
        raise UserError(f"training.{name} = 'on': cannot run here: {obstacle}")
    used = wanted != "off" and obstacle is None
    logger.info("%s: %s", name, "used" if used else f"not used ({obstacle or 'off'})")
    return used


def force_torch_optimizer() -> None:
    """Make Megatron build torch's AdamW even where a fused Adam is installed (it chooses at import, by what it finds).

    Checked against megatron-core 0.16: `get_megatron_optimizer` reads this module-level switch.
    """
    from megatron.core import optimizer

    assert hasattr(optimizer, "USING_PYTORCH_OPTIMIZER"), "megatron-core has another switch: see optimizer/__init__.py"
    optimizer.USING_PYTORCH_OPTIMIZER = True


FUSED_THD_ATTENTION = (9, 0)
"""Compute capability that Transformer Engine's fused attention over packed sequences needs (its fused_attn.cpp); below
it the plain one would hold scores of all tokens against all."""


def transformer_engine_obstacle() -> Obstacle:
    """Why Transformer Engine's parts cannot run here. Megatron replaces one that fails to import by a dummy."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    return _import_obstacle("transformer_engine.pytorch")


def transformer_engine_attention_obstacle() -> Obstacle:
    """Why its attention over packed sequences cannot run here."""
    if obstacle := transformer_engine_obstacle():
        return obstacle
    capability = torch.cuda.get_device_capability()
    if capability < FUSED_THD_ATTENTION:
        wanted, found = (".".join(map(str, numbers)) for numbers in (FUSED_THD_ATTENTION, capability))
        return f"needs compute capability {wanted} or higher, {torch.cuda.get_device_name()} has {found}"
    return None


def _fused_optimizer_obstacle() -> Obstacle:
    if not torch.cuda.is_available():
        return "needs a GPU"
    engine, apex = _import_obstacle("transformer_engine.pytorch.optimizers"), _apex_obstacle("amp_C")
    return None if engine is None or apex is None else f"{engine}; {apex}"


def _fusion_obstacle() -> Obstacle:
    return "needs a GPU" if not torch.cuda.is_available() else _apex_obstacle("fused_weight_gradient_mlp_cuda")


def _apex_obstacle(extension: Literal["amp_C", "fused_weight_gradient_mlp_cuda"]) -> Obstacle:
    """Why NVIDIA apex with one of its compiled extensions cannot be used."""
    if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is None:
        return "the package `apex` installed here is not NVIDIA's (the one on PyPI is a web toolkit): see README.md"
    return _import_obstacle(extension)


def _import_obstacle(module: str) -> Obstacle:
    try:
        importlib.import_module(module)
    except Exception as error:  # a compiled extension may fail in any way when its CUDA does not fit
        reason = str(error).partition("\n")[0]
        return f"{module} cannot be imported ({type(error).__name__}: {reason})"
    return None
