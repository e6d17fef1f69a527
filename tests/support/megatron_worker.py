"""One rank of a real Megatron training run on fixed data; started by test_megatron.py, results as JSON and safetensors.

RANK=0 WORLD_SIZE=2 NPD_RENDEZVOUS=... python megatron_worker.py '{"checkpoint": ..., "tp": 2, "out": ...}'

A list of such jobs runs one after another.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gathering import gather_hugging_face
from safetensors.torch import save_file

from megatron_npd.config import TrainingConfig
from megatron_npd.data.batch import PackedBatch, TrainingSample, collate
from megatron_npd.data.context_parallel import context_parallel_share
from megatron_npd.data.packing import pack_balanced
from megatron_npd.distributed.collectives import broadcast_object
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore import checkpoint, optimizer_state
from megatron_npd.mcore.attention import choose_backend
from megatron_npd.mcore.checkpoint import Checkpointer, latest_checkpoint, load_checkpoint, model_state, read_run_state
from megatron_npd.mcore.model import ModelOptions, build_gpt, named_parameters
from megatron_npd.mcore.model_parallel import initialize, leave_layout, shutdown
from megatron_npd.mcore.optimizer import make_trainable, micro_batch_multiple, train_step
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.training.schedule import deal
from megatron_npd.training.step import collect_sums, forward_step
from megatron_npd.weights.load import load_hugging_face

CAPACITY, TOP_K = 96, 4


def make_samples(vocab_size: int, count: int = 24) -> list[TrainingSample]:
    """Random samples of uneven lengths with a plausible teacher annotation."""
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        prompt, response = generator.integers(2, 12), generator.integers(1, 24)
        logprobs = np.log(generator.dirichlet(np.ones(TOP_K + 1), response)).astype(np.float32)
        ids = np.stack([generator.choice(vocab_size, TOP_K, replace=False) for _ in range(response)])
        samples.append(
            TrainingSample(
                prompt_ids=generator.integers(0, vocab_size, prompt).astype(np.int32),
                response_ids=generator.integers(0, vocab_size, response).astype(np.int32),
                behaviour_logprobs=-generator.random(response).astype(np.float32),
                topk_ids=ids.astype(np.int32),
                topk_logprobs=logprobs[:, :TOP_K],
                tail_mass=np.exp(logprobs[:, TOP_K]),
            )
        )
    return samples


def packs_of(count: int, per_pack: int) -> list[list[int]]:
    return [list(range(start, min(start + per_pack, count))) for start in range(0, count, per_pack)]


def packs_for(job: dict[str, Any], samples: list[TrainingSample]) -> list[list[int]]:
    """Consecutive samples, or a packing of other samples together."""
    if job.get("packing") == "balanced":
        lengths = np.array([sample.length for sample in samples])
        return pack_balanced(lengths, CAPACITY, lengths.astype(float))
    return packs_of(len(samples), job.get("samples_per_pack", 3))


def mean_of_micro_batch_means(step: Callable[..., Any]) -> Callable[..., Any]:
    """The fault of others: each micro-batch normalised by its own tokens, then all of them weighted alike."""

    def faulty(batches: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        output, loss = step(batches, model)

        def mean(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            total, tokens, report = loss(hidden)
            return total / tokens, torch.ones_like(tokens), report

        return output, mean

    return faulty


def local_batches(packs: list[list[int]], samples: list[TrainingSample], parallel: Parallel) -> list[PackedBatch]:
    """This rank's micro-batches, dealt and split as the trainer does."""
    costs = [float(sum(samples[item].length for item in items)) for items in packs]
    mine = deal(packs, costs, parallel.dp_size, micro_batch_multiple(parallel))[parallel.dp_rank]
    return [
        context_parallel_share(
            collate([samples[item] for item in items], CAPACITY, TOP_K, parallel.sequence_alignment),
            parallel.cp_rank,
            parallel.cp_size,
        )
        for items in mine
    ]


@contextlib.contextmanager
def counted(module: Any, name: str) -> Iterator[list[Any]]:
    """The calls of a function while this lasts: a list of their arguments."""
    calls, function = [], getattr(module, name)

    def count(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **keywords)

    setattr(module, name, count)
    try:
        yield calls
    finally:
        setattr(module, name, function)


def _kill_this_process(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(job: dict[str, Any]) -> None:
    """One training run in the layout the job asks for; on a fresh model parallel state of the same processes."""
    config = TrainingConfig(
        **{
            "tensor_model_parallel_size": job.get("tp", 1),
            "pipeline_model_parallel_size": job.get("pp", 1),
            "virtual_pipeline_model_parallel_size": job.get("vpp", 1),
            "context_parallel_size": job.get("cp", 1),
            "sequence_parallel": job.get("sp", False),
            "distributed_optimizer": job.get("distributed_optimizer", False),
            "sequence_length": CAPACITY,
        }
        | job.get("training", {})
    )
    parallel = initialize(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.context_parallel_size,
        config.virtual_pipeline_model_parallel_size,
        deterministic=job.get("deterministic", False),
    )
    dims = read_model_dims(job["checkpoint"])
    dtype = getattr(torch, job.get("dtype", "float32"))
    options = ModelOptions(
        choose_backend("auto", dtype), config.sequence_parallel, config.recompute, config.recompute_layers
    )
    models = build_gpt(dims, parallel, dtype, options)
    load_hugging_face(named_parameters(models), job["checkpoint"], dims, parallel)
    loaded = {n: t.clone() for n, t in gather_hugging_face(named_parameters(models), dims, parallel)}
    trainable = make_trainable(models, config, parallel)
    samples = make_samples(dims.vocab_size)
    batches = local_batches(packs_for(job, samples), samples, parallel)
    loss_step = forward_step(config, dims, parallel)
    if job.get("fault") == "mean_of_micro_batch_means":
        loss_step = mean_of_micro_batch_means(loss_step)
    history, out = [], Path(job["out"])
    checkpointer = Checkpointer(out / "checkpoints", trainable)
    if job.get("fault") == "writer_dies":
        checkpoint._write = lambda *_, **__: os._exit(9)
    if job.get("fault") == "writers_child_is_killed":
        checkpoint.filesystem_async.FileSystemWriterAsync.write_preloaded_data = _kill_this_process
    if "resume_from" in job:
        load_checkpoint(Path(job["resume_from"]), trainable)
    for step in range(job.get("first_step", 0), job["steps"]):
        if step == job.get("checkpoint_at") or (step and job.get("checkpoint_every")):
            checkpointer.save(step, {"step": step})
        if step == job.get("disturb_at"):  # train on, then return to the checkpoint: must leave no trace
            train_step(trainable, batches, loss_step, CAPACITY, 1e-2)
            checkpointer.wait()
            current = latest_checkpoint(out / "checkpoints")
            load_checkpoint(current, trainable)
            assert read_run_state(current) == {"step": job["checkpoint_at"]}
        rate = job.get("lr", 1e-3)
        reports, norm = train_step(trainable, batches, loss_step, CAPACITY, rate)
        sums = collect_sums(reports, parallel) if parallel.is_last_stage else None
        sums = broadcast_object(sums, source=parallel.logging_rank)
        history.append({"loss": sums.loss / sums.tokens, "tokens": sums.tokens, "norm": norm})
    if job.get("checkpoint_after"):
        with counted(torch.distributed, "all_reduce") as reductions:
            checkpointer.save(job["steps"], {"step": job["steps"]})
        blocks = optimizer_state.sharded_for_loading(trainable, model_state(models)).values()
        held = sum(block.data.numel() for block in blocks)
        (out / f"state_{parallel.rank}.json").write_text(json.dumps({"held": held, "all_reduces": len(reductions)}))
    checkpointer.wait()
    trained = dict(gather_hugging_face(named_parameters(trainable.models), dims, parallel))
    if parallel.tp_rank == 0 and parallel.is_first_replica:
        save_file(loaded, out / f"loaded_{parallel.pp_rank}.safetensors")
        save_file(trained, out / f"trained_{parallel.pp_rank}.safetensors")
    if parallel.rank == 0:
        (out / "history.json").write_text(json.dumps(history))
    leave_layout()


def main(jobs: list[dict[str, Any]]) -> None:
    """Run one job after another in the same processes: starting them takes longer than training."""
    for job in jobs:
        train(job)
    shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    main(job if isinstance(job, list) else [job])
