"""Which attention a GPU gets, by what is really there: answers of `torch.cuda`, modules and signatures are made up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_npd.errors import UserError
from megatron_npd.mcore import attention
from megatron_npd.mcore.attention import TorchVarlenAttention, choose_backend
from megatron_npd.mcore.packed import LocalSequences


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("must not be called")


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=None):
    return query * scale


def varlen_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=None, enable_gqa=False
):  # fmt: skip
    return query * scale if enable_gqa else query * 0


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, Transformer Engine, and the varlen attention of torch 2.12."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))
    with_varlen(monkeypatch, varlen_2_12)


def with_varlen(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = function
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)


def without_transformer_engine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As after an installation against another torch: the package is there, its PyTorch part fails to load."""
    package = folder / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("try:\n    from . import pytorch\nexcept ImportError:\n    pass\n")
    (package / "pytorch" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')\n")
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.usefixtures("h100")
def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", torch.bfloat16) == "te"


@pytest.mark.usefixtures("h100")
def test_float32_has_the_reference_alone() -> None:
    assert choose_backend("auto", torch.float32) == "reference"
    with pytest.raises(UserError, match=r"^training.attention_backend = 'te': .*needs bfloat16 or float16$"):
        choose_backend("te", torch.float32)


@pytest.mark.usefixtures("h100")
def test_a_transformer_engine_that_does_not_load_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_transformer_engine(monkeypatch, tmp_path)
    caplog.set_level("INFO")
    assert choose_backend("auto", torch.bfloat16) == "torch_varlen"
    assert "te: transformer_engine.pytorch cannot be imported (ImportError: undefined symbol: _ZN3c10)" in caplog.text
    with pytest.raises(UserError, match=r"'te': cannot run here: transformer_engine\.pytorch cannot be imported"):
        choose_backend("te", torch.bfloat16)


@pytest.mark.usefixtures("h100")
def test_an_a100_has_no_fused_attention_over_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    assert choose_backend("auto", torch.bfloat16) == "torch_varlen"
    with pytest.raises(UserError, match=r"needs compute capability 9\.0 or higher, NVIDIA A100 has 8\.0"):
        choose_backend("te", torch.bfloat16)


@pytest.mark.usefixtures("h100")
def test_the_first_varlen_attention_lacks_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_varlen(monkeypatch, varlen_2_10)
    with pytest.raises(UserError, match=r"needs torch 2\.11 or later: .* has no scale and no window_size"):
        choose_backend("torch_varlen", torch.bfloat16)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(UserError, match="has no varlen_attn"):
        choose_backend("torch_varlen", torch.bfloat16)


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("function", [varlen_2_11, varlen_2_12])
def test_grouped_heads_are_announced_where_that_is_asked_for(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_varlen(monkeypatch, function)
    assert choose_backend("torch_varlen", torch.bfloat16) == "torch_varlen"
    module = TorchVarlenAttention.__new__(TorchVarlenAttention)
    torch.nn.Module.__init__(module)
    module.softmax_scale = 0.5
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    query, key = torch.ones(6, 4, 8), torch.ones(6, 2, 8)
    output = module.attend(query, key, key, LocalSequences(bounds, bounds, 6, 6))
    assert torch.equal(output, query * 0.5)


def test_the_real_signature_of_this_torch_will_do() -> None:
    assert attention._varlen_obstacle() is None
