"""How a model is told to compute on a GPU, shown without one: which kernels torch and Megatron take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore import model_parallel
from megatron_npd.mcore.model import ModelOptions, _transformer_config
from megatron_npd.models.hf_config import ModelDims

DIMS = ModelDims("llama", 512, 64, 96, 2, 2, 1, 32, 1e-5, 1e4, 512, False)


@pytest.fixture
def torchs_choice() -> Iterator[None]:
    """What torch takes is as before when the test is over."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


class Joining(Exception):
    """The process is about to meet the others."""


@pytest.mark.usefixtures("torchs_choice")
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_no_mere_warning(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flash attention sums in a fixed order only where an operation that cannot is an error."""

    def join(*_: Any, **__: Any) -> None:
        raise Joining

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(Joining):
        model_parallel.initialize(deterministic=deterministic)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory, "all memory that is taken would be written first"


@pytest.mark.usefixtures("torchs_choice")
def test_megatron_is_told_as_well(parallel: Parallel) -> None:
    on_gpu = replace(parallel, device="cuda:0")

    def told(where: Parallel) -> bool:
        return _transformer_config(DIMS, 1, where, torch.bfloat16, ModelOptions("reference")).deterministic_mode

    assert not told(on_gpu)
    torch.use_deterministic_algorithms(True)
    assert told(on_gpu)
    assert not told(parallel), "a CPU sums in one order anyway, and its numbers stay"


def test_swiglu_is_fused_on_a_gpu_alone(parallel: Parallel) -> None:
    options = ModelOptions("reference")
    for device, fused in (("cpu", False), ("cuda:1", True)):
        config = _transformer_config(DIMS, 1, replace(parallel, device=device), torch.bfloat16, options)
        assert config.bias_activation_fusion is fused
