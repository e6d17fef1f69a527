"""One rank that loads converted checkpoints into real models and saves them as the trainer does; see test_convert.py.

RANK=0 WORLD_SIZE=8 NPD_RENDEZVOUS=... python convert_worker.py '[{"tp": 2, "pp": 1, "models": [{...}, ...]}, ...]'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_npd.config import TrainingConfig
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore.checkpoint import Checkpointer, load_model_only
from megatron_npd.mcore.model import ModelOptions, build_gpt
from megatron_npd.mcore.model_parallel import initialize, leave_layout, shutdown
from megatron_npd.mcore.optimizer import make_trainable
from megatron_npd.models.hf_config import read_model_dims


def save_again(checkpoint: Path, dtype: torch.dtype, out: Path, parallel: Parallel) -> None:
    """Load a converted checkpoint in this layout and save it, with the optimizer's state after a step of rate 0."""
    models = build_gpt(read_model_dims(checkpoint / "hf"), parallel, dtype, ModelOptions("reference"))
    with torch.no_grad():
        for parameter in (parameter for model in models for parameter in model.parameters()):
            parameter.fill_(float("nan"))  # what is not loaded shows
    load_model_only(checkpoint, models)
    trainable = make_trainable(models, TrainingConfig(), parallel)
    for chunk in trainable.chunks:
        chunk.zero_grad_buffer()
    for group in trainable.optimizer.param_groups:
        group["lr"] = 0.0
    trainable.optimizer.step()
    Checkpointer(out, trainable, asynchronous=False).save(1, {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    for layout in json.loads(sys.argv[1]):
        parallel = initialize(layout["tp"], layout["pp"])
        for model in layout["models"]:
            save_again(Path(model["checkpoint"]), getattr(torch, model["dtype"]), Path(model["out"]), parallel)
        leave_layout()
    shutdown()
