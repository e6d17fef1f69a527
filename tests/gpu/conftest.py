"""Tests that run ON a GPU: each says so by being in this folder, and is skipped, with the reason, where none is."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_npd.hardware import device

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    reason = _obstacle() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _obstacle() -> str | None:
    if not device.has_gpu():
        return "no GPU on this machine"
    if unused := device.unused_gpus():
        return unused
    import torch

    return None if torch.cuda.is_available() else "torch can use no GPU (its build, the driver, CUDA_VISIBLE_DEVICES?)"
