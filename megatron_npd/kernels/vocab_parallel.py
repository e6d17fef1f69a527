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
"""Tokens whose logits are held in float32 at a time on a CPU: few enough to stay in its cache between passes."""
CHUNK_ON_GPU = 1024
"""On a GPU, which no launch may leave with too little to do: 0.6 GB of float32 at 153,376 columns."""


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
        mine_CK, column_CK = self._own_columns(ids_CK)
        return torch.where(mine_CK, logits_CV.gather(1, column_CK).float(), 0.0)

    def overwrite(self, into_CV: torch.Tensor, ids_CK: torch.Tensor, values_CK: torch.Tensor) -> None:
        """Put values at the ids that this rank owns.

        Without asking the device which those are: in the place of another rank's id the row's first own one is written
        once more, or, in a row without any, column 0 as it is.
        """
        if not into_CV.shape[1]:
            return
        mine_CK, column_CK = self._own_columns(ids_CK)
        first_C1 = mine_CK.int().argmax(1, keepdim=True)
        has_own_C1 = mine_CK.gather(1, first_C1)
        spare_C1 = torch.where(has_own_C1, values_CK.gather(1, first_C1), into_CV[:, :1])
        columns_CK = torch.where(mine_CK, column_CK, column_CK.gather(1, first_C1))
        into_CV.scatter_(1, columns_CK, torch.where(mine_CK, values_CK, spare_C1))

    def add(self, into_CV: torch.Tensor, ids_C1: torch.Tensor, values_C1: torch.Tensor) -> None:
        """Add values at the ids, one a row, that this rank owns."""
        if not into_CV.shape[1]:
            return
        mine_C1, column_C1 = self._own_columns(ids_C1)
        into_CV.scatter_add_(1, column_C1, torch.where(mine_C1, values_C1, 0.0))

    def logsumexp_without(self, z_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
        """logsumexp over this rank's columns except the ids, [C]; overwrites `z_CV`. -inf where no column is left."""
        self.overwrite(z_CV, ids_CK, torch.full_like(ids_CK, -torch.inf, dtype=z_CV.dtype))
        return torch.logsumexp(z_CV, -1)

    def _own_columns(self, ids_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(whether this rank owns an id, its local column or 0)."""
        mine_CK = self.owns(ids_CK)
        return mine_CK, torch.where(mine_CK, ids_CK - self.first, 0)


def chunks(
    logits_TV: torch.Tensor, shard: VocabShard, temperature: float = 1.0
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, float32 [rows, valid] of logits / temperature) of successive chunks; copies, free to be overwritten."""
    size = CHUNK if logits_TV.device.type == "cpu" else CHUNK_ON_GPU
    for start in range(0, len(logits_TV), size):
        rows = slice(start, min(start + size, len(logits_TV)))
        z_CV = logits_TV[rows, : shard.valid].detach().to(torch.float32, copy=True)
        yield rows, z_CV if temperature == 1 else z_CV.div_(temperature)
