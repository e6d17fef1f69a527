"""One rank of a real Megatron training run on fixed data; started by test_megatron.py, results as JSON and safetensors.

RANK=0 WORLD_SIZE=2 NPD_RENDEZVOUS=... python megatron_worker.py '{"checkpoint": ..., "tp": 2, "out": ...}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_npd.config import TrainingConfig
from megatron_npd.data.packing import PackedBatch, TrainingSample, collate
from megatron_npd.hf_config import read_model_dims
from megatron_npd.mcore.attention import choose_backend
from megatron_npd.mcore.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from megatron_npd.mcore.model import build_gpt, named_parameters
from megatron_npd.mcore.optimizer import make_trainable, train_step, unwrap
from megatron_npd.mcore.parallel import broadcast_object, initialize, shutdown
from megatron_npd.training.schedule import share_of_rank
from megatron_npd.training.step import collect_sums, forward_step
from megatron_npd.weights.load import load_hugging_face
from megatron_npd.weights.publish import gather_hugging_face

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


def main(job: dict[str, Any]) -> None:
    config = TrainingConfig(
        tensor_model_parallel_size=job.get("tp", 1),
        pipeline_model_parallel_size=job.get("pp", 1),
        sequence_parallel=job.get("sp", False),
        distributed_optimizer=job.get("distributed_optimizer", False),
        sequence_length=CAPACITY,
    )
    parallel = initialize(config.tensor_model_parallel_size, config.pipeline_model_parallel_size)
    dims = read_model_dims(job["checkpoint"])
    dtype = getattr(torch, job.get("dtype", "float32"))
    model = build_gpt(dims, parallel, dtype, choose_backend("auto", dtype), config.sequence_parallel)
    load_hugging_face(named_parameters(model), job["checkpoint"], dims, parallel)
    loaded = {n: t.clone() for n, t in gather_hugging_face(named_parameters(model), dims, parallel)}
    trainable = make_trainable(model, config, parallel)
    samples = make_samples(dims.vocab_size)
    packs = packs_of(len(samples), job.get("samples_per_pack", 3))
    batches: list[PackedBatch] = [
        collate([samples[item] for item in items], CAPACITY, TOP_K)
        for items in share_of_rank(packs, parallel.dp_rank, parallel.dp_size)
    ]
    history, out = [], Path(job["out"])
    for step in range(job["steps"]):
        if step == job.get("checkpoint_at"):
            save_checkpoint(out / "checkpoints", step, trainable, {"step": step})
        if step == job.get("disturb_at"):  # train on, then return to the checkpoint: must leave no trace
            train_step(trainable, batches, forward_step(config, dims, parallel), CAPACITY, 1e-2)
            assert load_checkpoint(latest_checkpoint(out / "checkpoints"), trainable) == {"step": job["checkpoint_at"]}
        reports, norm = train_step(trainable, batches, forward_step(config, dims, parallel), CAPACITY, 1e-3)
        sums = collect_sums(reports) if parallel.is_last_stage else None
        last_stage = (parallel.pp_size - 1) * parallel.tp_size * parallel.dp_size
        sums = broadcast_object(sums, source=last_stage)
        history.append({"loss": sums.loss / sums.tokens, "tokens": sums.tokens, "norm": norm})
    trained = dict(gather_hugging_face(named_parameters(unwrap(trainable)), dims, parallel))
    if parallel.tp_rank == 0 and parallel.dp_rank == 0:
        save_file(loaded, out / f"loaded_{parallel.pp_rank}.safetensors")
        save_file(trained, out / f"trained_{parallel.pp_rank}.safetensors")
    if parallel.rank == 0:
        (out / "history.json").write_text(json.dumps(history))
    shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
