"""Packed prefill: forward-only passes over (prefix, response) pairs through one Megatron model.

Legend: N response tokens of a pack, V columns of this rank's logits, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_npd.data.batch import lay_out
from megatron_npd.data.packing import pack
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.hardware.transfer import to_device
from megatron_npd.kernels import token_logprobs, topk_logprobs
from megatron_npd.mcore.model import (
    ModelOptions,
    build_gpt,
    forward_packed,
    named_parameters,
    projected,
    valid_vocab_columns,
)
from megatron_npd.models.hf_config import ModelDims, read_model_dims
from megatron_npd.process import activity
from megatron_npd.teacher.scorer import Annotation, Pair
from megatron_npd.weights.load import load_hugging_face


class PrefillModel:
    """A `Scorer` on Megatron: a frozen model for forward passes. `load` gives it another checkpoint's weights."""

    def __init__(
        self,
        folder: str | Path,
        parallel: Parallel,
        dtype: torch.dtype,
        options: ModelOptions,
        vocabulary: int,
        chunk_tokens: int = 4096,
        own: int | None = None,
        rows: int = 0,
    ):
        """`vocabulary`: ids below it may be among the top-k (what teacher and student have in common). `own`: ids below
        it enter the softmax, None: the same; a teacher that has tokens of its own keeps their probability, as tail.
        `chunk_tokens`: rows projected to the vocabulary at a time. `rows`: embedding rows there are at least, the more
        of the two models', so that their logits are cut over the ranks at the same ids."""
        dims = read_model_dims(folder)
        self.dims: ModelDims = replace(dims, more_rows=max(rows - dims.vocab_size, 0))
        self.parallel = parallel
        self.chunk_tokens = chunk_tokens
        [self.model] = build_gpt(self.dims, parallel, dtype, options)
        self.model.eval().requires_grad_(False)
        self.valid = valid_vocab_columns(self.dims.rows, parallel, vocabulary)
        self.own = valid_vocab_columns(self.dims.rows, parallel, vocabulary if own is None else own)
        self.has_surplus = own is not None and own > vocabulary
        self.load(folder)

    def load(self, folder: str | Path) -> None:
        """Take the weights of a checkpoint of the same dimensions."""
        load_hugging_face(named_parameters([self.model]), folder, self.dims, self.parallel)

    def logits(self, pairs: list[Pair]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits at the positions that predict the pairs' response tokens: (rows, [chunk, V]) of successive chunks."""
        return self.project(self.hidden(pairs))

    @torch.no_grad()
    def hidden(self, pairs: list[Pair]) -> torch.Tensor:
        """Last hidden states at the positions that predict the pairs' response tokens, [N, H]."""
        tokens, cu_seqlens, rows = lay_out(pairs)
        tokens, rows = to_device(self.parallel.device, tokens, rows)
        return forward_packed(self.model, tokens, cu_seqlens, rows, self.parallel)

    @torch.no_grad()
    def project(self, hidden_NH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Hidden states to logits: (rows, [chunk, V]) of successive chunks."""
        yield from projected(self.model, hidden_NH, self.chunk_tokens)

    def mean_nll(self, pairs: list[Pair], pack_length: int) -> np.ndarray:
        """Mean negative log-likelihood of each response, nats a token, float64 [len(pairs)]; NaN for an empty one."""
        nll = np.full(len(pairs), np.nan)
        for items in _packs(pairs, pack_length):
            group = [pairs[item] for item in items]
            targets = response_tokens(group).to(self.parallel.device)
            scored = [
                token_logprobs(logits_CV, targets[rows], self.parallel, self.own)
                for rows, logits_CV in self.logits(group)
            ]
            nll[items] = _mean_nll(scored, group)
        return nll

    def annotate(
        self, pairs: list[Pair], pack_length: int, k: int, temperature: float = 1.0
    ) -> tuple[np.ndarray, list[Annotation | None]]:
        """`mean_nll` (at temperature 1) and the top-k of softmax(logits / temperature) at every response token, from
        the same pass; None for an empty response."""
        nll = np.full(len(pairs), np.nan)
        annotations: list[Annotation | None] = [None] * len(pairs)
        for items in _packs(pairs, pack_length):
            group = [pairs[item] for item in items]
            targets = response_tokens(group).to(self.parallel.device)
            scored, best = [], []
            for rows, logits_CV in self.logits(group):
                scored.append(token_logprobs(logits_CV, targets[rows], self.parallel, self.own))
                best.append(self._topk(logits_CV, k, temperature))
            nll[items] = _mean_nll(scored, group)
            ids, logprobs, tail = (torch.cat(parts).cpu().numpy() for parts in zip(*best, strict=True))
            bounds = np.cumsum([len(response) for _, response in group])[:-1]
            parts = zip(*(np.split(x, bounds) for x in (ids.astype(np.int32), logprobs, tail)), strict=True)
            for item, part in zip(items, parts, strict=True):
                annotations[item] = Annotation(*part)
        return nll, annotations

    def _topk(
        self, logits_CV: torch.Tensor, k: int, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k most probable of the common ids, their log-probabilities in the softmax over all own ids, and the mass
        outside them: int64 [C, K], float32 [C, K], float32 [C]."""
        ids_CK, logprobs_CK, tail_C = topk_logprobs(logits_CV, k, self.parallel, self.valid, temperature)
        if not self.has_surplus:
            return ids_CK, logprobs_CK, tail_C
        # log of the common ids' share of the mass: how much less any of them has where the surplus has its part.
        scaled_CV = logits_CV if temperature == 1 else logits_CV.float() / temperature
        best_C = ids_CK[:, 0].contiguous()
        among_own_C, among_common_C = (
            token_logprobs(scaled_CV, best_C, self.parallel, columns) for columns in (self.own, self.valid)
        )
        share_C = among_own_C - among_common_C
        return ids_CK, logprobs_CK + share_C[:, None], tail_C * share_C.exp() - torch.expm1(share_C)


def response_tokens(pairs: list[Pair]) -> torch.Tensor:
    """The response tokens of all pairs, int64 [N]: the targets of their logits."""
    return torch.from_numpy(np.concatenate([response for _, response in pairs]).astype(np.int64))


def _packs(pairs: list[Pair], pack_length: int) -> Iterator[list[int]]:
    """Indices of pairs that are prefilled together; pairs with an empty response are left out."""
    scored = [index for index, (_, response) in enumerate(pairs) if len(response)]
    lengths = np.array([len(pairs[index][0]) + len(pairs[index][1]) - 1 for index in scored], dtype=np.int64)
    for group in pack(lengths, pack_length):
        activity.progress()
        yield [scored[number] for number in group]


def _mean_nll(logprobs: list[torch.Tensor], pairs: list[Pair]) -> list[float]:
    flat = torch.cat(logprobs).double().cpu().numpy()
    bounds = np.cumsum([len(response) for _, response in pairs])[:-1]
    return [-float(piece.mean()) for piece in np.split(flat, bounds)]
