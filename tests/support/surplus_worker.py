"""One rank of a teacher that has tokens of its own; started by test_surplus_tokens.py, results as a .npz file.

RANK=0 WORLD_SIZE=2 NPD_RENDEZVOUS=... python surplus_worker.py '{"teacher": ..., "out": ..., "common": 100, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore.model import ModelOptions
from megatron_npd.mcore.model_parallel import initialize, shutdown
from megatron_npd.teacher.prefill import PrefillModel
from megatron_npd.teacher.scorer import Pair


def random_pairs(common: int, count: int = 7) -> list[Pair]:
    """Prompts and responses of ids below `common`."""
    generator = np.random.default_rng(3)

    def tokens(low: int, high: int) -> np.ndarray:
        return generator.integers(3, common, generator.integers(low, high)).astype(np.int32)

    return [(tokens(1, 20), tokens(1, 30)) for _ in range(count)]


def annotated(
    teacher: str | Path, parallel: Parallel, common: int, own: int, temperature: float
) -> dict[str, np.ndarray]:
    """NLLs and annotations of `random_pairs`, all responses one after another."""
    model = PrefillModel(teacher, parallel, torch.float32, ModelOptions("reference"), common, 16, own)
    nll, annotations = model.annotate(random_pairs(common), 64, 5, temperature)
    names = ("ids", "logprobs", "tail_mass")
    return {"nll": nll} | {name: np.concatenate([getattr(one, name) for one in annotations]) for name in names}


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    found = annotated(job["teacher"], initialize(int(os.environ["WORLD_SIZE"])), *job["arguments"])
    np.savez(f"{job['out']}_{os.environ['RANK']}.npz", **found)
    shutdown()
