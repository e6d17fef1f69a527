"""Causal attention over packed (THD) sequences, one interface, three backends.

    te            Transformer Engine's DotProductAttention (GPU)
    torch_varlen  torch's own variable-length flash attention (GPU, 16-bit, torch >= 2.10)
    reference     torch's scaled_dot_product_attention, sequence by sequence (any device, any dtype)

`choose_backend` picks the first that can run here and names it in the log; a forced backend that cannot run is
an error, never replaced.

Legend: T tokens of the packed batch, H local query heads, G local key-value heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from megatron_npd.errors import UserError

logger = logging.getLogger(__name__)
BACKENDS = ("te", "torch_varlen", "reference")


def choose_backend(requested: str, dtype: torch.dtype) -> str:
    """The backend to use: `requested`, or with "auto" the fastest that can run here.

    Raises:
        UserError: a backend was forced that cannot run here; the text says why.
    """
    if requested == "auto":
        chosen = next(backend for backend in BACKENDS if not _obstacle(backend, dtype))
        reasons = "; ".join(f"{b}: {_obstacle(b, dtype)}" for b in BACKENDS if _obstacle(b, dtype))
        logger.info("attention backend: %s%s", chosen, f" ({reasons})" if reasons else "")
        return chosen
    if obstacle := _obstacle(requested, dtype):
        raise UserError(f"training.attention_backend = {requested!r}: cannot run here: {obstacle}")
    logger.info("attention backend: %s (forced)", requested)
    return requested


def attention_module(backend: str) -> type[MegatronModule]:
    """The core-attention class of a backend, for a Megatron layer spec."""
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return {"torch_varlen": TorchVarlenAttention, "reference": ReferenceAttention}[backend]


def packed_sequences(cu_seqlens: torch.Tensor) -> PackedSeqParams:
    """Megatron's description of a packed batch; `cu_seqlens` is int32 [sequences + 1], starting at 0."""
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


class _PackedAttention(MegatronModule):
    """The signature Megatron's SelfAttention calls; backends fill in `attend`."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any):
        super().__init__(config=config)
        self.softmax_scale = config.kv_channels**-0.5

    def forward(
        self,
        query_THD: torch.Tensor,
        key_TGD: torch.Tensor,
        value_TGD: torch.Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attention output, [T, H * D]."""
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd", "only packed batches"
        output_THD = self.attend(query_THD, key_TGD, value_TGD, packed_seq_params)
        return output_THD.reshape(output_THD.shape[0], -1)

    def attend(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        raise NotImplementedError


class ReferenceAttention(_PackedAttention):
    """scaled_dot_product_attention on each sequence: slow to launch, exact, runs everywhere."""

    def attend(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        bounds = packed.cu_seqlens_q.tolist()
        outputs = []
        for start, end in itertools.pairwise(bounds):
            query, key, value = (x[start:end].transpose(0, 1)[None] for x in (query_THD, key_TGD, value_TGD))
            attended = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
            outputs.append(attended[0].transpose(0, 1))
        return torch.cat(outputs)


class TorchVarlenAttention(_PackedAttention):
    """torch.nn.attention.varlen: one flash-attention launch for the whole batch."""

    def attend(
        self, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            query_THD.contiguous(),
            key_TGD.contiguous(),
            value_TGD.contiguous(),
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal
            enable_gqa=query_THD.shape[1] != key_TGD.shape[1],
        )


def _obstacle(backend: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run here, or None."""
    if backend == "reference":
        return None
    if not torch.cuda.is_available():
        return "needs a GPU"
    if backend == "te" and importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    if backend == "torch_varlen":
        if dtype not in (torch.bfloat16, torch.float16):
            return "needs bfloat16 or float16"
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return "needs torch 2.10 or later"
    return None
