"""Rotary embedding: frequencies as a checkpoint's config.json says, and the angles of packed sequences in one go.

Legend: T this rank's tokens of a pack, D head dimension.
"""

from __future__ import annotations

import functools
import math

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

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


class PackedRotary(RotaryEmbedding):
    """Angles of every token of a pack, gathered once a forward.

    Megatron's own way, without Transformer Engine's kernel, is a loop over the sequences in each layer, for queries and
    for keys, that waits for the device: for a pack of 30 sequences thousands of small launches.
    """

    positions: torch.Tensor
    """int64 [T]; set before each forward."""

    def forward(self, max_seq_len: int, *_: object, **__: object) -> torch.Tensor:
        """Angles, float32 [T, 1, D]."""
        return self.get_emb(max_seq_len)[:, 0].index_select(0, self.positions)


@functools.cache
def compile_turning() -> None:
    """Let torch make one kernel of what turns queries and keys by their angles, on a GPU.

    Written out it is ten launches, each of which reads and writes them all: a tenth of the step of an openPangu-1B on
    an H100. Checked against megatron-core 0.16 to 0.19: `apply_rotary_pos_emb` calls this function for all of a pack.
    """
    assert hasattr(rope_utils, "_apply_rotary_pos_emb_bshd"), "megatron-core turns elsewhere: see rope_utils.py"
    rope_utils._apply_rotary_pos_emb_bshd = torch.compile(rope_utils._apply_rotary_pos_emb_bshd)
