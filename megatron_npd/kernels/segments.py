"""Sums over the sequences of a pack.

Legend: T tokens, S sequences.
"""

from __future__ import annotations

import torch

from megatron_npd.kernels import native


def segment_sum(values_T: torch.Tensor, cu_seqlens: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of each sequence's values, float64 [S]; 0 for an empty one. The same bits on every run.

    Args:
        values_T: float32. cu_seqlens: int32 [S + 1], where sequences begin, ascending from 0, and T.
        mask_T: bool; values where it is false are left out, whatever they are.
    """
    if values_T.dtype == torch.float32 and native.run_on(values_T.device.type):
        return native.segment_sum(values_T, cu_seqlens, mask_T)
    kept_T = values_T.double() if mask_T is None else torch.where(mask_T, values_T, 0.0).double()
    return torch.segment_reduce(kept_T, "sum", offsets=cu_seqlens.long(), initial=0)
