"""The GPU's attention backends against ours in float32: outputs and gradients, grouped heads, shares of a context."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_npd.mcore.attention import ReferenceAttention, TorchVarlenAttention, attention_module, backend_obstacle
from megatron_npd.mcore.packed import packed_sequences

BOUNDS = np.cumsum([0, 128, 4, 512, 64, 1000]).astype(np.int32)
HEAD_DIM = 128


@pytest.mark.parametrize(("cp_rank", "cp_size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 2)])
def test_torch_varlen_is_as_near_as_rounding_allows(heads: int, groups: int, cp_rank: int, cp_size: int) -> None:
    """No further from float32 than the reference itself is in bfloat16."""
    if obstacle := backend_obstacle("torch_varlen", torch.bfloat16):
        pytest.skip(obstacle)
    sequences = packed_sequences(BOUNDS, cp_rank, cp_size, "cuda").local
    tensors = random_tensors(int(sequences.cu_seqlens_q[-1]), heads, groups)

    def computed(module: type[ReferenceAttention], dtype: torch.dtype) -> list[torch.Tensor]:
        query, key, value = (x.to(dtype, copy=True).requires_grad_() for x in tensors[:3])
        ours = bare(module)
        keys = (key, value)
        if sequences.key_index is not None:
            keys = tuple(x.index_select(0, sequences.key_index) for x in keys)
        output = ours.attend(query, *keys, sequences)
        output.backward(tensors[3].to(dtype))
        return [output.detach(), query.grad, key.grad, value.grad]

    exact = computed(ReferenceAttention, torch.float32)
    rounded, varlen = (computed(module, torch.bfloat16) for module in (ReferenceAttention, TorchVarlenAttention))
    for name, right, near, ours in zip(("output", "query", "key", "value"), exact, rounded, varlen, strict=True):
        assert distance(ours, right) < max(1.2 * distance(near, right), 2**-9), name


def test_te_is_as_near_as_rounding_allows(parallel) -> None:
    if obstacle := backend_obstacle("te", torch.bfloat16):
        pytest.skip(obstacle)
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_npd.mcore.model import ModelOptions, _transformer_config
    from megatron_npd.models.hf_config import ModelDims

    dims = ModelDims("llama", 512, 1024, 2048, 1, 8, 2, HEAD_DIM, 1e-5, 1e4, 4096, False)
    config = _transformer_config(dims, 2, parallel, torch.bfloat16, ModelOptions("te"))
    module = attention_module("te")(config, 1, AttnMaskType.padding_causal, "self").cuda()
    packed = packed_sequences(BOUNDS, device="cuda", fused_rotary=True)
    tensors = random_tensors(int(BOUNDS[-1]), 8, 2)

    def reference(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors[:3]]
        output = bare(ReferenceAttention).attend(*leaves, packed.local)
        output.backward(tensors[3].to(dtype))
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    leaves = [x.bfloat16().requires_grad_() for x in tensors[:3]]
    output = module(*leaves, None, AttnMaskType.padding_causal, packed_seq_params=packed)
    output.backward(tensors[3].bfloat16().reshape(output.shape))
    ours = [output.detach().reshape(tensors[0].shape), *(leaf.grad for leaf in leaves)]
    exact, rounded = reference(torch.float32), reference(torch.bfloat16)
    for name, right, near, result in zip(("output", "query", "key", "value"), exact, rounded, ours, strict=True):
        assert distance(result, right) < max(1.2 * distance(near, right), 2**-9), name


def random_tensors(tokens: int, heads: int, groups: int) -> list[torch.Tensor]:
    """Queries, all ranks' keys and values, and the output's gradient; bfloat16's values, in float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(tokens, heads), (int(BOUNDS[-1]), groups), (int(BOUNDS[-1]), groups), (tokens, heads)]
    return [torch.randn(*shape, HEAD_DIM, device="cuda", generator=generator).bfloat16().float() for shape in shapes]


def bare(module: type[ReferenceAttention]) -> ReferenceAttention:
    """The backend without Megatron's configuration, of which it needs one number."""
    ours = module.__new__(module)
    torch.nn.Module.__init__(ours)
    ours.softmax_scale = HEAD_DIM**-0.5
    return ours


def distance(ours: torch.Tensor, right: torch.Tensor) -> float:
    return float((ours.float() - right).norm() / right.norm())
