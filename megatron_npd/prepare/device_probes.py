"""What `npd check --devices` tries on a device, each probe in a process of its own: a GPU that failed stays failed.

    python -m megatron_npd.prepare.device_probes NAME

prints what was found as one line and exits with status 0, or prints why not and exits with another. Runs on a CPU as
well, where the tests run it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_npd.hardware import device

ROWS, COLUMNS, TOP_K = 64, 50_003, 10
"""Of a block of logits; the columns of no kernel's vectors."""
NATS = 1e-5
SEQUENCES = (32, 256, 8, 128, 88)
"""Of a pack of 512 tokens."""


def main(name: str) -> int:
    device.settle()
    try:
        print(PROBES[name]())
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        return 1
    return 0


def kernels() -> str:
    """Score and top-k of the fused operators against float64, on every device."""
    from megatron_npd.distributed.parallel import SINGLE
    from megatron_npd.kernels import native, token_logprobs, topk_logprobs

    worst, places = 0.0, devices()
    if not native.run_on(torch.device(places[0]).type):
        raise RuntimeError("the fused operators do not run; build them: python -m megatron_npd.kernels.build")
    for place in places:
        generator = torch.Generator().manual_seed(0)
        logits = (torch.randn(ROWS, COLUMNS, generator=generator) * 3).to(place, torch.bfloat16)
        targets = torch.randint(0, COLUMNS, (ROWS,), generator=generator).to(place)
        exact = logits.double().log_softmax(-1)
        score = token_logprobs(logits, targets, SINGLE, COLUMNS) - exact.gather(1, targets[:, None])[:, 0]
        best = topk_logprobs(logits, TOP_K, SINGLE, COLUMNS)[1] - exact.topk(TOP_K, -1).values
        worst = max(worst, float(score.abs().max()), float(best.abs().max()))
    if not worst < NATS:
        raise RuntimeError(f"score or top-k is off by {worst:.1e} nats, at most {NATS:.0e} is right")
    return f"score and top-k within {worst:.0e} nats of float64 on {counted(places)}"


def attention() -> str:
    """A small model with every attention backend that runs here, against the reference in float32."""
    from megatron_npd.config import TrainingConfig
    from megatron_npd.mcore.acceleration import NONE, choose_layers
    from megatron_npd.mcore.attention import BACKENDS, backend_obstacle
    from megatron_npd.mcore.model_parallel import initialize, shutdown

    parallel = initialize()
    exact = hidden_states(parallel, "reference", torch.float32, NONE)
    rounding = distance(hidden_states(parallel, "reference", torch.bfloat16, NONE), exact)
    found, wrong = [], []
    for backend in BACKENDS:
        if reason := backend_obstacle(backend, torch.bfloat16):
            found.append(f"{backend} not ({reason})")
            continue
        layers = choose_layers(TrainingConfig()) if backend == "te" else NONE
        off = distance(hidden_states(parallel, backend, torch.bfloat16, layers), exact)
        found.append(f"{backend} {off:.1e}")
        if not off <= 2 * rounding:
            wrong.append(
                f"{backend} is off by {off:.1e} of the reference in float32, where rounding takes {rounding:.1e}"
            )
    shutdown()
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return f"from the reference in float32: {', '.join(found)}"


def training_step() -> str:
    """One optimizer step of a small model by all ranks of this probe, data-parallel over their devices."""
    from megatron_npd.config import TrainingConfig
    from megatron_npd.mcore.acceleration import choose_acceleration
    from megatron_npd.mcore.attention import choose_backend
    from megatron_npd.mcore.model import ModelOptions, build_gpt
    from megatron_npd.mcore.model_parallel import initialize, shutdown
    from megatron_npd.mcore.optimizer import make_trainable, train_step
    from megatron_npd.training.step import collect_sums, forward_step

    parallel = initialize()
    config = TrainingConfig(sequence_length=sum(SEQUENCES), data_parallel_size=parallel.world_size)
    acceleration = choose_acceleration(config)
    options = ModelOptions(choose_backend("auto", torch.bfloat16), acceleration=acceleration)
    models = build_gpt(small_dims(), parallel, torch.bfloat16, options)
    trainable = make_trainable(models, config, parallel, acceleration)
    loss_step = forward_step(config, small_dims(), parallel)
    reports, norm = train_step(trainable, [small_batch()], loss_step, config.sequence_length, 1e-4)
    sums = collect_sums(reports, parallel)
    shutdown()
    return f"loss {sums.loss / sums.tokens:.2f}, gradient norm {norm:.2f}, {options.attention_backend} attention"


def engine() -> str:
    """One prompt to a small model in vLLM."""
    from megatron_npd.config import RolloutConfig
    from megatron_npd.schema import TEACHER_VERSION
    from megatron_npd.vllm_engine.engine import Request, RolloutEngine

    with tempfile.TemporaryDirectory() as folder:
        small_checkpoint(Path(folder))
        rollout = RolloutConfig(kv_cache_gib=0.1, max_num_seqs=8, gpu_memory_utilization=0.3)
        serving = RolloutEngine(Path(folder), TEACHER_VERSION, rollout, "float32" if on_cpu() else "bfloat16", 128)
        [response] = serving.generate([Request(list(range(10, 42)), 0, 16, [])])
    return f"{len(response.ids)} tokens sampled by {device.installed_vllm()}"


PROBES = {"kernels": kernels, "attention": attention, "training_step": training_step, "engine": engine}


def on_cpu() -> bool:
    return not torch.cuda.is_available()


def devices() -> list[str]:
    return ["cpu"] if on_cpu() else [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def counted(places: list[str]) -> str:
    return "the CPU" if places == ["cpu"] else f"{len(places)} GPU{'s' if len(places) > 1 else ''}"


def small_dims() -> Any:
    from megatron_npd.models.hf_config import ModelDims

    return ModelDims("qwen3", 1024, 512, 1024, 2, 8, 2, 64, 1e-5, 1e4, 1024, True, qk_norm=True)


def hidden_states(parallel: Any, backend: str, dtype: torch.dtype, layers: Any) -> torch.Tensor:
    """Of a pack, from weights that depend on their names and shapes alone; float32 [tokens, hidden]."""
    from megatron_npd.mcore.model import ModelOptions, build_gpt, forward_packed, named_parameters

    [model] = build_gpt(small_dims(), parallel, dtype, ModelOptions(backend, acceleration=layers))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(named_parameters([model]).items())):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.copy_(1 + 0.1 * drawn if parameter.ndim == 1 else drawn * parameter.shape[-1] ** -0.5)
        batch = small_batch()
        tokens, rows = (torch.from_numpy(x).to(parallel.device) for x in (batch.tokens, batch.rows))
        hidden = forward_packed(model, tokens, batch.cu_seqlens, rows, parallel)
        return hidden.reshape(len(rows), -1).float()


def small_batch() -> Any:
    """A pack of `SEQUENCES` with made-up labels."""
    import numpy as np

    from megatron_npd.data.batch import TrainingSample, collate

    draw = np.random.default_rng(0)
    samples = []
    for length in SEQUENCES:
        response = length // 2
        logprobs = np.log(draw.dirichlet(np.ones(TOP_K + 1), response)).astype(np.float32)
        ids = np.stack([draw.choice(1024, TOP_K, replace=False) for _ in range(response)])
        samples.append(
            TrainingSample(
                prompt_ids=draw.integers(0, 1024, length - response + 1).astype(np.int32),
                response_ids=draw.integers(0, 1024, response).astype(np.int32),
                behaviour_logprobs=np.full(response, -5.0, dtype=np.float32),
                topk_ids=ids.astype(np.int32),
                topk_logprobs=logprobs[:, :TOP_K],
                tail_mass=np.exp(logprobs[:, TOP_K]),
            )
        )
    return collate(samples, sum(SEQUENCES), TOP_K)


def small_checkpoint(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def distance(ours: torch.Tensor, right: torch.Tensor) -> float:
    return float((ours - right).norm() / right.norm())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
