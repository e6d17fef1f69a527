"""From host memory to the device that computes."""

from __future__ import annotations

import numpy as np
import torch


def to_device(device: str, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Arrays as tensors of a device, with their dtypes and shapes; on a CPU they share memory.

    To a GPU they go through pinned memory, in the order of its stream: nobody waits, neither the host nor the device.
    """
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    if device == "cpu":
        return tensors
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
