"""A rank's slice of the vocabulary.

Legend: T tokens, C tokens of a chunk, V columns of this rank's logits, K ids a token.
Ids are global; a row never holds an id twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_npd.distributed.parallel import Parallel

CHUNK = 64
"""Tokens whose logits are held in float32 at a time: few enough to stay in a CPU's cache between passes."""


@dataclass(frozen=True)
class VocabShard:
    """This rank owns the global ids [first, first + valid); its columns from `valid` on are padding.

    An id of another rank must never alias a local column, so every access by id goes through here.
    """

    first: int
    valid: int

    @classmethod
    def of(cls, columns: int, parallel: Parallel, valid: int) -> VocabShard:
        """The slice of a rank with `columns` columns, padding included (the same number on every rank)."""
        return cls(parallel.tp_rank * columns, valid)

    def owns(self, ids_CK: torch.Tensor) -> torch.Tensor:
        """Which ids lie on this rank, bool [C, K]."""
        return (ids_CK >= self.first) & (ids_CK < self.first + self.valid)

    def read(self, logits_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
        """Logits at the ids, float32 [C, K]; 0 for ids of other ranks."""
        mine_CK = self.owns(ids_CK)
        local_CK = logits_CV.gather(1, torch.where(mine_CK, ids_CK - self.first, 0)).float()
        return torch.where(mine_CK, local_CK, 0.0)

    def overwrite(self, into_CV: torch.Tensor, ids_CK: torch.Tensor, values_CK: torch.Tensor) -> None:
        """Put values at the ids that this rank owns."""
        row, place, column = self._own_places(ids_CK)
        into_CV[row, column] = values_CK[row, place]

    def add(self, into_CV: torch.Tensor, ids_CK: torch.Tensor, values_CK: torch.Tensor) -> None:
        """Add values at the ids that this rank owns."""
        row, place, column = self._own_places(ids_CK)
        into_CV[row, column] += values_CK[row, place]

    def logsumexp_without(self, z_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
        """logsumexp over this rank's columns except the ids, [C]; overwrites `z_CV`. -inf where no column is left."""
        self.overwrite(z_CV, ids_CK, torch.full_like(ids_CK, -torch.inf, dtype=z_CV.dtype))
        return torch.logsumexp(z_CV, -1)

    def _own_places(self, ids_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(row, place in the row, local column) of every id that this rank owns."""
        row, place = self.owns(ids_CK).nonzero(as_tuple=True)
        return row, place, ids_CK[row, place] - self.first


def chunks(
    logits_TV: torch.Tensor, shard: VocabShard, temperature: float = 1.0
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, float32 [rows, valid] of logits / temperature) of successive chunks; copies, free to be overwritten."""
    for start in range(0, len(logits_TV), CHUNK):
        rows = slice(start, min(start + CHUNK, len(logits_TV)))
        z_CV = logits_TV[rows, : shard.valid].detach().to(torch.float32, copy=True)
        yield rows, z_CV if temperature == 1 else z_CV.div_(temperature)
