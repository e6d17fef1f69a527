"""Rotary frequencies as a checkpoint's config.json says, for scalings that Megatron's own arguments cannot express."""

from __future__ import annotations

import math

import torch

from megatron_npd.models.hf_config import ModelDims, RopeScaling


def inverse_frequencies(dims: ModelDims) -> torch.Tensor:
    """Radians a position of each pair of a head's dimensions, float32 [head_dim / 2] on the CPU."""
    exponents = torch.arange(0, dims.head_dim, 2, dtype=torch.float32) / dims.head_dim
    frequencies = 1.0 / (dims.rope_theta**exponents)
    return frequencies if dims.rope_scaling is None else scaled(frequencies, dims.rope_scaling)


def scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Frequencies after scaling.

    linear: all divided by the factor. llama3: waves much longer than the pretraining positions are divided by it, much
    shorter ones stay, and those between are blended linearly in (positions / wavelength). Source: transformers'
    `modeling_rope_utils`, which follows Meta's Llama 3.1.
    """
    slowed = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return slowed
    waves_in_pretraining = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((waves_in_pretraining - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * slowed + kept * frequencies
