"""Where one process stands in the parallel layout: plain data, made once by `mcore.model_parallel.initialize`.

Passed as an argument instead of being fetched from global state, so that a function's signature says on
which groups it communicates. Groups are `torch.distributed.ProcessGroup`, or None when the group has one
member (and then nothing is communicated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parallel:
    """Sizes, ranks and groups of tensor (tp), pipeline (pp), context (cp) and data (dp) parallelism."""

    rank: int = 0
    world_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    virtual_pp_size: int = 1
    """Model chunks of one pipeline stage; more than 1: interleaved pipeline."""
    cp_rank: int = 0
    cp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_group: Any = None
    cp_group: Any = None
    dp_cp_group: Any = None
    """Every rank that holds the same parameters: data and context parallelism together."""
    device: str = "cpu"

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits and the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_logging_rank(self) -> bool:
        """The one rank that sees the loss and writes metrics: last stage, first of tp, cp and dp."""
        return self.is_last_stage and self.tp_rank == 0 and self.is_first_replica

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank is the first of those that hold the same parameters."""
        return self.dp_rank == 0 and self.cp_rank == 0

    @property
    def logging_rank(self) -> int:
        """Global rank of the logging rank in Megatron's rank order: tp fastest, then cp, then dp, then pp."""
        return (self.pp_size - 1) * self.tp_size * self.cp_size * self.dp_size

    @property
    def sequence_alignment(self) -> int:
        """Every sequence of a pack must take a multiple of this many positions: each is cut in 2 cp equal chunks."""
        return 2 * self.cp_size if self.cp_size > 1 else 1


SINGLE = Parallel()
"""One process, no communication."""
