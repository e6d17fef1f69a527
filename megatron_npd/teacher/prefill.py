"""Packed prefill: forward-only passes over (prefix, response) pairs through one Megatron model.

Legend: N response tokens of a pack, V columns of this rank's logits, K top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_npd.data.packing import lay_out, pack
from megatron_npd.hf_config import ModelDims, read_model_dims
from megatron_npd.kernels import token_logprobs, topk_logprobs
from megatron_npd.mcore.model import build_gpt, forward_packed, named_parameters, valid_vocab_columns
from megatron_npd.parallel import Parallel
from megatron_npd.weights.load import load_hugging_face

logger = logging.getLogger(__name__)
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Annotation:
    """Teacher top-k of one response: int32 [R, K], float32 [R, K], float32 [R]."""

    ids: np.ndarray
    logprobs: np.ndarray
    tail_mass: np.ndarray


class PrefillModel:
    """A frozen model for forward passes; `load` replaces its weights in place by another checkpoint's."""

    def __init__(self, folder: str | Path, parallel: Parallel, dtype: torch.dtype, backend: str, vocabulary: int):
        """`vocabulary`: ids below it enter the softmax (what teacher and student have in common)."""
        self.dims: ModelDims = read_model_dims(folder)
        self.parallel = parallel
        self.model: Any = build_gpt(self.dims, parallel, dtype, backend).eval().requires_grad_(False)
        self.valid = valid_vocab_columns(self.dims.vocab_size, parallel, vocabulary)
        self.load(folder)

    def load(self, folder: str | Path) -> None:
        """Take the weights of a checkpoint of the same dimensions."""
        load_hugging_face(named_parameters(self.model), folder, self.dims, self.parallel)

    @torch.no_grad()
    def logits(self, pairs: list[Pair]) -> torch.Tensor:
        """Logits at the positions that predict the pairs' response tokens, [N, V]."""
        tokens, cu_seqlens, rows = (torch.from_numpy(x).to(self.parallel.device) for x in lay_out(pairs))
        return forward_packed(self.model, tokens, cu_seqlens, rows)

    def mean_nll(self, pairs: list[Pair], pack_length: int) -> np.ndarray:
        """Mean negative log-likelihood of each response, nats a token, float64 [len(pairs)]; NaN for an empty one."""
        nll = np.full(len(pairs), np.nan)
        for items, logits_NV in self._packs(pairs, pack_length):
            self._fill_nll(nll, items, pairs, logits_NV)
        return nll

    def annotate(self, pairs: list[Pair], pack_length: int, k: int) -> tuple[np.ndarray, list[Annotation | None]]:
        """`mean_nll` and the top-k at every response token, from the same pass; None for an empty response."""
        nll = np.full(len(pairs), np.nan)
        annotations: list[Annotation | None] = [None] * len(pairs)
        for items, logits_NV in self._packs(pairs, pack_length):
            self._fill_nll(nll, items, pairs, logits_NV)
            ids, logprobs, tail = (x.cpu().numpy() for x in topk_logprobs(logits_NV, k, self.parallel, self.valid))
            bounds = np.cumsum([len(pairs[item][1]) for item in items])[:-1]
            parts = zip(*(np.split(x, bounds) for x in (ids.astype(np.int32), logprobs, tail)), strict=True)
            for item, part in zip(items, parts, strict=True):
                annotations[item] = Annotation(*part)
        return nll, annotations

    def _packs(self, pairs: list[Pair], pack_length: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(indices of pairs, their logits) pack by pack; pairs with an empty response are left out."""
        scored = [index for index, (_, response) in enumerate(pairs) if len(response)]
        lengths = np.array([len(pairs[index][0]) + len(pairs[index][1]) - 1 for index in scored], dtype=np.int64)
        for group in pack(lengths, pack_length):
            items = [scored[number] for number in group]
            yield items, self.logits([pairs[item] for item in items])

    def _fill_nll(self, nll: np.ndarray, items: list[int], pairs: list[Pair], logits_NV: torch.Tensor) -> None:
        responses = [pairs[item][1] for item in items]
        targets = torch.from_numpy(np.concatenate(responses).astype(np.int64)).to(self.parallel.device)
        logprobs = token_logprobs(logits_NV, targets, self.parallel, self.valid).double().cpu().numpy()
        for item, piece in zip(items, np.split(logprobs, np.cumsum([len(r) for r in responses])[:-1]), strict=True):
            nll[item] = -piece.mean()
