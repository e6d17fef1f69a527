"""Causal attention over packed (THD) sequences, one interface, three backends.

    te            Transformer Engine's DotProductAttention (GPU, 16-bit, compute capability 9.0 or higher)
    torch_varlen  torch's own variable-length flash attention (GPU, 16-bit, torch >= 2.11)
    reference     torch's scaled_dot_product_attention, sequence by sequence, short ones at once in float32 on a CPU
                  (any device, any dtype)

`choose_backend` picks the first that can run here and names it in the log; a forced backend that cannot run is
an error, never replaced. Under context parallelism Transformer Engine passes keys around in a ring; the other two
gather keys and values over the ranks and attend to what each local query may see (`mcore.packed`).

Legend: T this rank's tokens, U tokens of all context-parallel ranks, H local query heads, G local key-value heads,
D head dimension, B sequences that are computed together, W their padded length.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_npd.errors import UserError
from megatron_npd.mcore.acceleration import transformer_engine_attention_obstacle
from megatron_npd.mcore.packed import LocalSequences, PackedSequences

logger = logging.getLogger(__name__)
BACKENDS = ("te", "torch_varlen", "reference")
LENGTHS_ON_CPU = 32
"""Sequences are rounded up to a multiple of this: see `_excess`, `_batches`."""
SHORT = 256
"""Sequences of so many tokens take longer to launch than to compute."""


def choose_backend(requested: str, dtype: torch.dtype) -> str:
    """The backend to use: `requested`, or with "auto" the fastest that can run here.

    Raises:
        UserError: a backend was forced that cannot run here; the text says why.
    """
    if requested == "auto":
        chosen = next(backend for backend in BACKENDS if not backend_obstacle(backend, dtype))
        reasons = "; ".join(f"{b}: {backend_obstacle(b, dtype)}" for b in BACKENDS if backend_obstacle(b, dtype))
        logger.info("attention backend: %s%s", chosen, f" ({reasons})" if reasons else "")
        return chosen
    if obstacle := backend_obstacle(requested, dtype):
        raise UserError(f"training.attention_backend = {requested!r}: cannot run here: {obstacle}")
    logger.info("attention backend: %s (forced)", requested)
    return requested


def attention_module(backend: str) -> type[MegatronModule]:
    """The core-attention class of a backend, for a Megatron layer spec."""
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return {"torch_varlen": TorchVarlenAttention, "reference": ReferenceAttention}[backend]


class _PackedAttention(MegatronModule):
    """The signature Megatron's SelfAttention calls; backends fill in `attend`."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        self.softmax_scale = config.kv_channels**-0.5
        self.cp_group = pg_collection.cp if pg_collection else None

    def forward(
        self,
        query_THD: torch.Tensor,
        key_TGD: torch.Tensor,
        value_TGD: torch.Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attention output, [T, H * D]."""
        assert isinstance(packed_seq_params, PackedSequences), "only packed batches"
        sequences = packed_seq_params.local
        if sequences.key_index is not None:
            key_TGD, value_TGD = (
                gather_from_sequence_parallel_region(x, group=self.cp_group).index_select(0, sequences.key_index)
                for x in (key_TGD, value_TGD)
            )
        return self.attend(query_THD, key_TGD, value_TGD, sequences).reshape(query_THD.shape[0], -1)

    def attend(
        self, query_THD: torch.Tensor, key_UGD: torch.Tensor, value_UGD: torch.Tensor, sequences: LocalSequences
    ) -> torch.Tensor:
        """Causal attention of each piece, aligned at the bottom right; [T, H, D]."""
        raise NotImplementedError


class ReferenceAttention(_PackedAttention):
    """scaled_dot_product_attention on each sequence: slow to launch, exact, runs everywhere.

    Short sequences of about the same length go together, padded behind: causal attention does not look there.
    """

    def attend(
        self, query_THD: torch.Tensor, key_UGD: torch.Tensor, value_UGD: torch.Tensor, sequences: LocalSequences
    ) -> torch.Tensor:
        pieces_q, pieces_k = (
            list(itertools.pairwise(bounds.tolist())) for bounds in (sequences.cu_seqlens_q, sequences.cu_seqlens_k)
        )
        batches = _batches(pieces_q, pieces_k) if _short_ones_together(query_THD) else {}
        together = {piece for members in batches.values() for piece in members}
        outputs, starts = [], []
        for number, ((start_q, end_q), (start_k, end_k)) in enumerate(zip(pieces_q, pieces_k, strict=True)):
            if number not in together:
                pieces = query_THD[start_q:end_q], key_UGD[start_k:end_k], value_UGD[start_k:end_k]
                outputs.append(self._attend_one(*pieces))
                starts.append(torch.arange(start_q, end_q))
        for width, members in batches.items():
            rows, is_real = _padded_rows([pieces_q[number] for number in members], width)
            attended = self._attend_padded((query_THD, key_UGD, value_UGD), rows)
            outputs.append(attended[is_real.reshape(-1).nonzero()[:, 0]])
            starts.append(rows[is_real])
        return torch.cat(outputs)[torch.cat(starts).argsort()] if batches else torch.cat(outputs)

    def _attend_one(self, query_THD: torch.Tensor, key_UGD: torch.Tensor, value_UGD: torch.Tensor) -> torch.Tensor:
        """Attention of one sequence, [T, H, D]."""
        query, key, value = (x.transpose(0, 1)[None] for x in (query_THD, key_UGD, value_UGD))
        if excess := _excess(query, key):
            query, key, value = (F.pad(x, (0, 0, 0, excess)) for x in (query, key, value))
        mask = _causal(query.shape[2], key.shape[2], query.device)
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale, enable_gqa=True, **mask)
        return attended[0, :, : query_THD.shape[0]].transpose(0, 1)

    def _attend_padded(self, tensors_THD: tuple[torch.Tensor, ...], rows_BW: torch.Tensor) -> torch.Tensor:
        """Attention of B sequences of W rows each, [B * W, H, D]; rows that pad one come out as anything."""
        query, key, value = (x[rows_BW].transpose(1, 2) for x in tensors_THD)
        attended = F.scaled_dot_product_attention(
            query, key, value, scale=self.softmax_scale, enable_gqa=True, is_causal=True
        )
        return attended.transpose(1, 2).flatten(0, 1)


class TorchVarlenAttention(_PackedAttention):
    """torch.nn.attention.varlen: one flash-attention launch for the whole batch.

    From torch 2.12 on it wants to be told that there are fewer key heads than query heads; 2.11 computes it unasked.
    """

    def attend(
        self, query_THD: torch.Tensor, key_UGD: torch.Tensor, value_UGD: torch.Tensor, sequences: LocalSequences
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        grouped = {"enable_gqa": query_THD.shape[1] != key_UGD.shape[1]}
        return varlen_attn(
            query_THD.contiguous(),
            key_UGD.contiguous(),
            value_UGD.contiguous(),
            sequences.cu_seqlens_q,
            sequences.cu_seqlens_k,
            sequences.max_seqlen_q,
            sequences.max_seqlen_k,
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal, aligned at the bottom right
            **(grouped if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}),
        )


def _short_ones_together(query: torch.Tensor) -> bool:
    """Not in 16 bit, where a kernel would be compiled for every number of sequences as well: see `_excess`."""
    return query.device.type == "cpu" and query.dtype == torch.float32


def _batches(pieces_q: list[tuple[int, int]], pieces_k: list[tuple[int, int]]) -> dict[int, list[int]]:
    """Padded length -> numbers of the sequences that are computed together: short ones whose queries are all of their
    keys. A single one is padded alike: what it gives must not depend on what else is in a pack."""
    found: dict[int, list[int]] = defaultdict(list)
    for number, (piece_q, piece_k) in enumerate(zip(pieces_q, pieces_k, strict=True)):
        length = piece_q[1] - piece_q[0]
        if piece_q == piece_k and 0 < length <= SHORT:
            found[-(-length // LENGTHS_ON_CPU) * LENGTHS_ON_CPU].append(number)
    return found


def _padded_rows(pieces: list[tuple[int, int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of B sequences, int64 [B, width], and whether each is one: a sequence is padded with its first row."""
    starts, ends = torch.tensor(pieces).T.unsqueeze(-1)
    rows = starts + torch.arange(width)
    is_real = rows < ends
    return torch.where(is_real, rows, starts), is_real


def _excess(query: torch.Tensor, key: torch.Tensor) -> int:
    """Positions to add behind a sequence; causal attention does not look at them.

    In 16 bit on a CPU, torch compiles kernels for every length it meets and keeps them: 1.6 MB a length, and as much
    again in holes between them (measured, forward and backward). Few lengths are also faster.
    """
    if query.device.type != "cpu" or query.dtype == torch.float32 or query.shape[2] != key.shape[2]:
        return 0
    return -query.shape[2] % LENGTHS_ON_CPU


def _causal(queries: int, keys: int, device: torch.device) -> dict[str, Any]:
    """Arguments of scaled_dot_product_attention for queries that are the last of the keys."""
    if queries == keys:
        return {"is_causal": True}
    return {"attn_mask": torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)}


def backend_obstacle(backend: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run here, or None."""
    if backend == "reference":
        return None
    if not torch.cuda.is_available():
        return "needs a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs bfloat16 or float16"
    return transformer_engine_attention_obstacle() if backend == "te" else _varlen_obstacle()


def _varlen_obstacle() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        lacking = ["varlen_attn"]
    else:
        lacking = sorted({"scale", "window_size"} - inspect.signature(varlen_attn).parameters.keys())
    return f"needs torch 2.11 or later: {torch.__version__} has no {' and no '.join(lacking)}" if lacking else None
