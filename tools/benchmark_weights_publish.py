"""What publishing costs: how long training stands still, and how long until a version is visible.

    python tools/benchmark_weights_publish.py --folder SCRATCH [--ranks 1 2] [--rounds 5] [--json FILE]

For every number of ranks (tensor parallel) a model of the quickstart student's shape trains on random tokens. Every
round: a plain copy with fsync of a version's weight files; two steps alone; a publication, and steps beside it until
it is visible. So what else the machine does meets all alike; the medians are of these rounds.

    copy       plain copy and fsync
    stall      training stands still: gathering and copying to host memory (no parity probe)
    seconds    from the beginning of the publication until the version is visible, beside training
    step       one step alone
    slowdown   what the steps beside the publication took longer than as many steps alone
    cost       stall + slowdown: all the time that training lost

Exit status: 0; 2 bad input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_npd.config import TrainingConfig
from megatron_npd.data.batch import TrainingSample, collate
from megatron_npd.distributed.collectives import barrier
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.files import read_json, write_json
from megatron_npd.mcore.attention import choose_backend
from megatron_npd.mcore.model import ModelOptions, build_gpt, named_parameters
from megatron_npd.mcore.model_parallel import initialize, shutdown
from megatron_npd.mcore.optimizer import Trainable, make_trainable, train_step
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.run_directory import RunDirectory
from megatron_npd.training.step import forward_step
from megatron_npd.weights.publish import Published, Publisher

# SmolLM2-135M with 13 of its 30 layers.
STUDENT = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 13,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TOP_K = 10
RANK_SECONDS = 1800


def main() -> int:
    arguments = _arguments()
    if arguments.rank_of:
        measure_rank(Path(arguments.rank_of), arguments)
        return 0
    try:
        if not arguments.folder.is_dir():
            raise UserError(f"--folder {arguments.folder}: no such folder")
        figures = {}
        for ranks in arguments.ranks:
            with tempfile.TemporaryDirectory(prefix="benchmark_publish_", dir=arguments.folder) as scratch:
                figures[f"tp{ranks}"] = measure(ranks, Path(scratch))
            report(f"tp{ranks}", figures[f"tp{ranks}"])
    except UserError as error:
        print(f"benchmark_weights_publish: error: {error}", file=sys.stderr)
        return USAGE_STATUS
    if arguments.json:
        write_json(arguments.json, figures)
    return 0


def measure(ranks: int, scratch: Path) -> dict[str, Any]:
    """What rank 0 of so many processes found: bytes, and seconds of every round."""
    write_json(scratch / "student" / "config.json", STUDENT)
    common = os.environ | {
        "WORLD_SIZE": str(ranks),
        "NPD_RENDEZVOUS": str(scratch / "rendezvous"),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, __file__, *sys.argv[1:], "--rank-of", str(scratch)]
    processes = [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(ranks)]
    try:
        statuses = [process.wait(RANK_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(statuses):
        raise RuntimeError(f"ranks exited with {statuses}")
    return read_json(scratch / "figures.json")


def measure_rank(scratch: Path, arguments: argparse.Namespace) -> None:
    """One rank's part of `measure`."""
    ranks = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, arguments.threads // ranks))
    parallel = initialize(ranks)
    config = TrainingConfig(
        tensor_model_parallel_size=ranks, sequence_parallel=ranks > 1, sequence_length=arguments.tokens
    )
    dims = read_model_dims(scratch / "student")
    options = ModelOptions(choose_backend("auto", torch.bfloat16), config.sequence_parallel)
    trainable = make_trainable(build_gpt(dims, parallel, torch.bfloat16, options), config, parallel)
    batch = collate([_sample(dims.vocab_size, arguments.tokens)], arguments.tokens, TOP_K, parallel.sequence_alignment)
    loss_step = forward_step(config, dims, parallel)
    published: list[Published] = []
    run = RunDirectory(scratch / "run")
    parameters = named_parameters(trainable.models)
    publisher = Publisher(run, parameters, dims, parallel, scratch / "student", published.append)
    publisher.publish(0, parameters)
    publisher.wait()
    rounds = []
    for version in range(1, arguments.rounds + 2):
        seconds = {"copy": _copy(run.version(version - 1), scratch / "copy", parallel)}
        alone = [_step(trainable, batch, loss_step, arguments.tokens) for _ in range(2)]
        started = time.monotonic()
        publisher.publish(version, parameters)
        seconds["stall"] = time.monotonic() - started
        beside = []
        while not publisher.poll():
            beside.append(_step(trainable, batch, loss_step, arguments.tokens))
        seconds["seconds"], seconds["step"] = published[-1].seconds, statistics.mean(alone)
        seconds["slowdown"] = sum(beside) - len(beside) * seconds["step"]
        seconds["cost"] = seconds["stall"] + seconds["slowdown"]
        rounds.append(seconds)
        if parallel.rank == 0:
            shutil.rmtree(run.version(version - 1))
        barrier()
    if parallel.rank == 0:
        counted = rounds[1:]  # the first warms up
        medians = {name: statistics.median(found[name] for found in counted) for name in counted[0]}
        figures = {"bytes": published[-1].bytes, "rounds": counted, "medians": medians}
        write_json(scratch / "figures.json", figures)
    shutdown()


def report(name: str, figures: dict[str, Any]) -> None:
    medians = figures["medians"]
    print(f"{name}: {figures['bytes'] / 1e6:.0f} MB of weights, {len(figures['rounds'])} rounds")
    for kind, seconds in medians.items():
        values = [found[kind] for found in figures["rounds"]]
        extremes = f"({min(values):.3f} to {max(values):.3f})"
        print(f"  {kind:9} {seconds:7.3f} s  {extremes:20} {seconds / medians['copy']:6.2f} copies")
    sys.stdout.flush()


def _copy(version: Path, target: Path, parallel: Parallel) -> float:
    """Seconds of a plain copy with fsync on rank 0, while the others wait."""
    barrier()
    started = time.monotonic()
    if parallel.rank == 0:
        target.mkdir()
        for file in version.glob("*.safetensors"):
            shutil.copyfile(file, target / file.name)
            with open(target / file.name, "rb") as stream:
                os.fsync(stream.fileno())
    seconds = time.monotonic() - started
    if parallel.rank == 0:
        shutil.rmtree(target)
    barrier()
    return seconds


def _step(trainable: Trainable, batch: Any, loss_step: Any, tokens: int) -> float:
    started = time.monotonic()
    train_step(trainable, [batch], loss_step, tokens, 1e-5)
    return time.monotonic() - started


def _sample(vocab_size: int, tokens: int) -> TrainingSample:
    """One random sample that fills a pack, a quarter of it prompt."""
    generator = np.random.default_rng(0)
    prompt = tokens // 4
    response = tokens - prompt
    logprobs = np.log(generator.dirichlet(np.ones(TOP_K + 1), response)).astype(np.float32)
    ids = np.stack([generator.choice(vocab_size, TOP_K, replace=False) for _ in range(response)])
    return TrainingSample(
        prompt_ids=generator.integers(0, vocab_size, prompt).astype(np.int32),
        response_ids=generator.integers(0, vocab_size, response).astype(np.int32),
        behaviour_logprobs=-generator.random(response).astype(np.float32),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=logprobs[:, :TOP_K],
        tail_mass=np.exp(logprobs[:, TOP_K]),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="SCRATCH", help="where to write and delete")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="tensor-parallel sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512, help="of a training step")
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
