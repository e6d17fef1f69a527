"""One rank that publishes a real Megatron model while it trains on; started by test_publish.py, results as JSON.

RANK=0 WORLD_SIZE=4 NPD_RENDEZVOUS=... python publish_worker.py '[{"checkpoint": ..., "run": ..., "out": ...}]'

Writing is made slow, interrupted or refused from outside of the code that writes: a slow hash, a limit of the system.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gathering import gather_hugging_face
from megatron_worker import CAPACITY, local_batches, make_samples, packs_of
from safetensors.torch import save_file

from megatron_npd.config import TrainingConfig
from megatron_npd.errors import UserError
from megatron_npd.mcore.attention import choose_backend
from megatron_npd.mcore.model import ModelOptions, build_gpt, named_parameters
from megatron_npd.mcore.model_parallel import initialize, leave_layout, shutdown
from megatron_npd.mcore.optimizer import make_trainable, train_step
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.run_directory import RunDirectory
from megatron_npd.training.step import forward_step
from megatron_npd.weights import share
from megatron_npd.weights.load import load_hugging_face
from megatron_npd.weights.publish import Published, Publisher

CHUNK = share.CHUNK
SMALLEST_BUCKET = 1024
"""Tiny models must be spread, too."""


def write_slowly(
    seconds_per_chunk: float = 0.0, *, die_after: int | None = None, hold: threading.Event | None = None
) -> None:
    """From now on writing sleeps before every chunk, or waits until `hold` is set; after `die_after` chunks this
    process kills itself."""
    written = 0

    class SlowHash:
        def __init__(self, content: bytes):
            self._hash = hashlib.sha256(content)
            self.hexdigest = self._hash.hexdigest

        def update(self, content: memoryview) -> None:
            nonlocal written
            written += 1
            if written == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(seconds_per_chunk)
            if hold:
                hold.wait()
            self._hash.update(content)

    share.hashlib = SimpleNamespace(sha256=SlowHash)
    share.CHUNK = 16384


def write_normally() -> None:
    """Undo `write_slowly`."""
    share.hashlib, share.CHUNK = hashlib, CHUNK


class Worker:
    """A model in the layout a job asks for, its training, and its publisher."""

    def __init__(self, job: dict[str, Any]):
        config = TrainingConfig(
            tensor_model_parallel_size=job.get("tp", 1),
            pipeline_model_parallel_size=job.get("pp", 1),
            virtual_pipeline_model_parallel_size=job.get("vpp", 1),
            context_parallel_size=job.get("cp", 1),
            distributed_optimizer=job.get("distributed_optimizer", False),
            sequence_length=CAPACITY,
        )
        parallel = initialize(
            config.tensor_model_parallel_size,
            config.pipeline_model_parallel_size,
            config.context_parallel_size,
            config.virtual_pipeline_model_parallel_size,
        )
        dims, dtype = read_model_dims(job["checkpoint"]), getattr(torch, job.get("dtype", "float32"))
        models = build_gpt(dims, parallel, dtype, ModelOptions(choose_backend("auto", dtype)))
        load_hugging_face(named_parameters(models), job["checkpoint"], dims, parallel)
        self.parallel, self.dims = parallel, dims
        self.trainable = make_trainable(models, config, parallel)
        self.published: list[Published] = []
        self.publisher = Publisher(
            RunDirectory(Path(job["run"])),
            self.parameters,
            dims,
            parallel,
            job["checkpoint"],
            self.published.append,
            smallest_bucket=SMALLEST_BUCKET,
        )
        samples = make_samples(dims.vocab_size, count=8)
        self._batches = local_batches(packs_of(len(samples), 2), samples, parallel)
        self._loss_step = forward_step(config, dims, parallel)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return named_parameters(self.trainable.models)

    def train(self) -> None:
        """One step that moves every weight a lot."""
        train_step(self.trainable, self._batches, self._loss_step, CAPACITY, 0.1)

    def now(self) -> dict[str, torch.Tensor]:
        """This stage in Hugging Face names, as it is; on tensor-parallel rank 0."""
        return {name: tensor.clone() for name, tensor in gather_hugging_face(self.parameters, self.dims, self.parallel)}

    def save(self, out: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if self.parallel.tp_rank == 0 and self.parallel.is_first_replica:
            save_file(tensors, out / f"{name}_{self.parallel.pp_rank}.safetensors")


def train_on(worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
    """Version 0 as loaded; then version 1, whose writing ends only after three steps more."""
    worker.publisher.publish(0, worker.parameters)
    worker.publisher.wait()
    worker.train()
    at_publication = worker.now()
    trained_on = threading.Event()
    write_slowly(hold=trained_on)
    worker.publisher.publish(1, worker.parameters)
    busy = []
    for _ in range(3):
        worker.train()
        busy.append(not worker.publisher.poll())
    early = (Path(job["run"]) / "weights" / "v000001").exists()
    trained_on.set()
    worker.publisher.wait()
    write_normally()
    worker.save(Path(job["out"]), "expected", at_publication)
    worker.save(Path(job["out"]), "trained", worker.now())
    held = sum(copy.bucket.nbytes for copy in worker.publisher.snapshot)
    published = [asdict(published) for published in worker.published]
    return {"busy": busy, "early": early, "held": held, "published": published}


def die(worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
    """Version 0, then one rank is killed in the middle of a file of version 1."""
    worker.publisher.publish(0, worker.parameters)
    worker.publisher.wait()
    write_slowly(0.05, die_after=3 if worker.parallel.rank == job["rank"] else None)
    worker.publisher.publish(1, worker.parameters)
    worker.publisher.wait()
    raise AssertionError("a rank was killed, and the others did not notice")


def fill_the_disk(worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
    """One rank cannot write as much as it wants to; when it can again, the version comes out."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if worker.parallel.rank == job["rank"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    started = time.monotonic()
    try:
        worker.publisher.publish(job["version"], worker.parameters)
        worker.publisher.wait()
        error = ""
    except UserError as refused:
        error = str(refused)
    seconds = time.monotonic() - started
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = sorted(path.name for path in (Path(job["run"]) / "weights").iterdir())
    torch.distributed.barrier()
    worker.publisher.publish(job["version"], worker.parameters)
    worker.publisher.wait()
    return {"error": error, "seconds": seconds, "left": left}


ACTIONS = {"train_on": train_on, "die": die, "fill_the_disk": fill_the_disk}


def main(jobs: list[dict[str, Any]]) -> None:
    """Run one job after another in the same processes: starting them takes longer than publishing."""
    for job in jobs:
        worker = Worker(job)
        told = ACTIONS[job["action"]](worker, job)
        (Path(job["out"]) / f"rank{worker.parallel.rank}.json").write_text(json.dumps(told))
        leave_layout()
    shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
