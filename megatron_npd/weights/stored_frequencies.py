"""Rotary frequencies that old checkpoints store, though all engines compute them from config.json."""

from __future__ import annotations

import math

import numpy as np

from megatron_npd.errors import UserError
from megatron_npd.models.hf_config import ModelDims, RopeScaling
from megatron_npd.weights.tensor_file import DTYPES, StoredTensor

INVERSE_FREQUENCIES = "rotary_emb.inv_freq"
"""How the names of such tensors end."""
ROUNDING = 1e-2
"""Relative: bfloat16 keeps eight bits."""
SMALLEST = {"F16": 2.0**-24}
"""The step between numbers near zero, where it is within reach of a frequency."""


def check_frequencies(called: str, name: str, stored: StoredTensor, dims: ModelDims) -> None:
    """Refuse stored frequencies that are not those of config.json, for nothing here would use them.

    With scaling, those before it are right as well: transformers stored them so, and scaled the positions.

    Raises:
        UserError: they are others, of another number, or of a type that is no float.
    """
    unscaled = dims.rope_theta ** -(np.arange(0, dims.head_dim, 2) / dims.head_dim)
    right = [unscaled] if dims.rope_scaling is None else [_scaled(unscaled, dims.rope_scaling), unscaled]
    if stored.dtype_name in DTYPES and stored.shape == unscaled.shape:
        found = stored.read().double().numpy()
        step = SMALLEST.get(stored.dtype_name, 0.0)
        if any(np.allclose(found, expected, rtol=ROUNDING, atol=step) for expected in right):
            return
    raise UserError(
        f"{called}: tensor {name} of {stored.path.name} holds rotary frequencies other than config.json implies "
        f"(rope_theta = {dims.rope_theta:g}); must be the same, or not there"
    )


def _scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """As `mcore.rotary.scaled`, which says where it is from."""
    slowed = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return slowed
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    waves = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * slowed + kept * frequencies
