"""One rank of a teacher and a student of different numbers of embedding rows; started by test_different_rows.py.

RANK=0 WORLD_SIZE=2 NPD_RENDEZVOUS=... python rows_worker.py '{"teacher": ..., "student": ..., "common": 128, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from surplus_worker import random_pairs

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore.model import ModelOptions
from megatron_npd.mcore.model_parallel import initialize, shutdown
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.teacher.heldout import HeldoutSet
from megatron_npd.teacher.prefill import PrefillModel


def figures(job: dict[str, Any], parallel: Parallel) -> dict[str, np.ndarray]:
    """NLLs of both models, the teacher's annotations, and the held-out figures of the student."""
    folders, common = (job["teacher"], job["student"]), job["common"]
    rows = max(read_model_dims(folder).vocab_size for folder in folders)
    teacher, student = (
        PrefillModel(folder, parallel, torch.float32, ModelOptions("reference"), common, 16, rows=rows)
        for folder in folders
    )
    pairs = random_pairs(common)
    nll, annotations = teacher.annotate(pairs, 64, 5)
    names = ("ids", "logprobs", "tail_mass")
    found = {name: np.concatenate([getattr(one, name) for one in annotations]) for name in names}
    heldout = HeldoutSet(teacher, pairs, 64, 1e9).evaluate(student)
    return found | {
        "nll": nll,
        "student": student.mean_nll(pairs, 64),
        "heldout": np.array(list(asdict(heldout).values())),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    found = figures(job, initialize(int(os.environ["WORLD_SIZE"])))
    np.savez(Path(f"{job['out']}_{os.environ['RANK']}.npz"), **found)
    shutdown()
