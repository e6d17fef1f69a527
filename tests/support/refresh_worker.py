"""One rank of a trainer that publishes two versions of each of several students; started by test_engine.py.

RANK=0 WORLD_SIZE=4 NPD_RENDEZVOUS=... python refresh_worker.py '["run_a/config.toml", "run_b/config.toml"]'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from megatron_worker import CAPACITY, local_batches, make_samples, packs_of

from megatron_npd.config import load_config
from megatron_npd.mcore.model_parallel import leave_layout, shutdown
from megatron_npd.mcore.optimizer import train_step
from megatron_npd.run_directory import RunDirectory
from megatron_npd.training.publishing import make_publisher, publish
from megatron_npd.training.step import forward_step
from megatron_npd.training.student import make_student


def publish_two_versions(path: str) -> None:
    """Version 0 as loaded, and version 1 after a step that moves every weight a lot."""
    config = load_config(path)
    run = RunDirectory(Path(config.run_directory))
    student = make_student(config)
    publisher = make_publisher(run, config, student, lambda published: None)
    publish(publisher, run, config, 0, student)
    publisher.wait()
    samples = make_samples(student.dims.vocab_size, count=8)
    batches = local_batches(packs_of(len(samples), 2), samples, student.parallel)
    loss_step = forward_step(config.training, student.dims, student.parallel)
    train_step(student.trainable, batches, loss_step, CAPACITY, config.training.lr)
    publish(publisher, run, config, 1, student)
    publisher.wait()
    leave_layout()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for configuration in json.loads(sys.argv[1]):
        publish_two_versions(configuration)
    shutdown()
