"""Rotary embedding of packs: our angles of a whole pack, and Transformer Engine's kernel, which is faked.

Both must be, bit for bit, what each sequence gets by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore import model as model_module
from megatron_npd.mcore.acceleration import Acceleration
from megatron_npd.mcore.attention import ReferenceAttention
from megatron_npd.mcore.model import ModelOptions, build_gpt, forward_packed
from megatron_npd.models.hf_config import ModelDims

DIMS = ModelDims("llama", 512, 64, 96, 2, 2, 1, 32, 1e-5, 1e4, 512, False)
BOUNDS = np.array([0, 7, 8, 40], dtype=np.int32)


class WantsBounds(ReferenceAttention):
    """As Transformer Engine's: without the sequences' bounds on the device it cannot start."""

    def forward(self, *arguments: Any, packed_seq_params: Any = None, **keywords: Any) -> torch.Tensor:
        assert packed_seq_params.cu_seqlens_q.tolist() == packed_seq_params.cu_seqlens_kv.tolist() == BOUNDS.tolist()
        return super().forward(*arguments, packed_seq_params=packed_seq_params, **keywords)


def sequence_by_sequence(t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, **_: Any) -> torch.Tensor:
    """What Transformer Engine's fused kernel computes, written out: the first angles for each sequence."""
    pieces = [t[start:end] for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    return torch.cat([rope_utils._apply_rotary_pos_emb_bshd(x[:, None], freqs[: len(x)])[:, 0] for x in pieces])


@pytest.mark.parametrize("layers", [False, True])
def test_transformer_engines_attention_without_its_layers_has_what_it_needs(
    layers: bool, parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transformer_engine = "off"` leaves its attention on. The angles of a whole pack in one go are, bit for bit,
    those of its sequences one by one."""
    tokens, rows = torch.arange(40) * 7 % 512, torch.arange(40)
    [ours] = build_gpt(DIMS, parallel, torch.float32, ModelOptions("reference"))
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", sequence_by_sequence)
    monkeypatch.setattr(model_module, "attention_module", lambda _: WantsBounds)
    options = ModelOptions("te", acceleration=Acceleration(transformer_engine=layers))
    if layers:  # which cannot be built here
        monkeypatch.setattr(model_module, "get_gpt_layer_with_transformer_engine_spec", local_layer)
    [theirs] = build_gpt(DIMS, parallel, torch.float32, options)
    theirs.load_state_dict(ours.state_dict())
    expected, got = (forward_packed(model, tokens, BOUNDS, rows, parallel) for model in (ours, theirs))
    assert torch.equal(got, expected)


def local_layer(qk_layernorm: bool) -> Any:
    layer = model_module.get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = model_module.RMSNorm
    return layer
