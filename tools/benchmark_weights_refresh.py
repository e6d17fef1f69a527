"""How long a refresh takes and how long generation stands still for it, on a real vLLM engine in this process.

    python tools/benchmark_weights_refresh.py --shape 135m [--layers 13] [--files 4] [--rounds 5] [--json FILE]

Two made-up versions of one student take turns. Every round: a plain copy of the version's weight files (page cache to
page cache, no fsync), one generation batch, then a refresh in its two parts: reading and verifying into memory, which
runs beside generation, and the stall: load, prefix cache, parity probe. So what else the machine does meets all alike;
the medians are of these rounds. Exit status: 0; 2 bad input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_npd.config import RolloutConfig
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.files import write_json
from megatron_npd.rollout.parity import check_parity
from megatron_npd.versions.manifest import PARITY, verify_version, write_manifest
from megatron_npd.vllm_engine.engine import Request, RolloutEngine

SHAPES = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1},
    # SmolLM2-135M; the quickstart's student has 13 of its layers.
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3},
}  # fmt: skip
EOS = 2


def main() -> int:
    arguments = _arguments()
    # As in a role's environment, before anything imports torch: spinning threads would measure who else is there.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(arguments.threads)}
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark_refresh_", dir=arguments.folder) as scratch:
            figures = measure(Path(scratch), arguments)
    except UserError as error:
        print(f"benchmark_weights_refresh: error: {error}", file=sys.stderr)
        return USAGE_STATUS
    report(figures)
    if arguments.json:
        write_json(arguments.json, figures)
    return 0


def measure(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported: settings, seconds of each round, medians."""
    sources = [make_source(scratch / f"source{seed}", seed, arguments) for seed in range(2)]
    rollout = RolloutConfig(threads=arguments.threads, kv_cache_gib=1.0, max_num_seqs=arguments.batch)
    longest = arguments.prompt_tokens + arguments.new_tokens
    folder = publish(sources[0], scratch / "v000000", 0)
    engine = RolloutEngine(folder, 0, rollout, "bfloat16", longest)
    rounds = [measure_round(engine, scratch, sources, rollout, arguments) for _ in range(arguments.rounds + 1)]
    counted = rounds[1:]  # the first warms up
    medians = {name: statistics.median(round_[name] for round_ in counted) for name in counted[0]}
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    settings = {name: value for name, value in vars(arguments).items() if name not in ("folder", "json")}
    return {"settings": settings, "bytes": nbytes, "rounds": counted, "medians": medians}


def measure_round(
    engine: RolloutEngine, scratch: Path, sources: list[Path], rollout: RolloutConfig, arguments: argparse.Namespace
) -> dict[str, float]:
    """Seconds of a copy, a generation batch and a refresh to the other weights."""
    version = engine.version + 1
    folder = publish(sources[version % 2], scratch / f"v{version:06d}", version)
    seconds = {"copy": timed(lambda: copy_weights(folder, scratch / "copy"))}
    seconds["verify_in_place"] = timed(lambda: verify_version(folder))
    seconds["generation_batch"] = timed(lambda: engine.generate(requests(arguments)))
    with engine.stage(folder, version) as staged:
        seconds["verify"] = staged.seconds
        seconds["load"] = timed(lambda: engine.refresh(staged))
        seconds["parity"] = timed(lambda: check_parity(engine, staged.probe, rollout))
    seconds["stall"] = seconds["load"] + seconds["parity"]
    seconds["refresh"] = seconds["verify"] + seconds["stall"]
    return seconds


def make_source(folder: Path, seed: int, arguments: argparse.Namespace) -> Path:
    """A random checkpoint in bfloat16, and its logprobs on a few sequences by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = SHAPES[arguments.shape] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    config = LlamaConfig(
        **shape, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=EOS, dtype=torch.bfloat16
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-total // arguments.files))
    sequences = torch.randint(3, shape["vocab_size"], (16, 32))
    with torch.no_grad():
        logprobs = model(sequences).logits[:, :-1].float().log_softmax(-1).gather(2, sequences[:, 1:, None])[..., 0]
    write_json(folder / PARITY, {"sequences": sequences.tolist(), "logprobs": logprobs.tolist()})
    return folder


def publish(source: Path, folder: Path, version: int) -> Path:
    """The source as a version of its own, without another copy of its weights."""
    folder.mkdir()
    for file in source.iterdir():
        os.link(file, folder / file.name)
    write_manifest(folder, version)
    return folder


def copy_weights(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.glob("*.safetensors"):
        shutil.copyfile(file, target / file.name)
    shutil.rmtree(target)


def requests(arguments: argparse.Namespace) -> list[Request]:
    """A generation batch: as many responses as one unit of work has, all of the full length."""
    prompt = list(range(3, 3 + arguments.prompt_tokens))
    return [Request([*prompt[1:], 3 + seed], seed, arguments.new_tokens, []) for seed in range(arguments.batch)]


def timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def report(figures: dict[str, Any]) -> None:
    medians = figures["medians"]
    print(f"weights: {figures['bytes'] / 1e6:.0f} MB; {json.dumps(figures['settings'])}")
    print(f"{'':17} {'median':>8} {'least':>8} {'most':>8} s {'copies':>8} {'batches':>8}")
    for name, median in medians.items():
        values = [seconds[name] for seconds in figures["rounds"]]
        copies, batches = median / medians["copy"], median / medians["generation_batch"]
        print(f"{name:17} {median:8.3f} {min(values):8.3f} {max(values):8.3f}   {copies:8.2f} {batches:8.3f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--layers", type=int, default=0, help="layers, instead of the shape's own")
    parser.add_argument("--files", type=int, default=4, help="weight files of a version, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--batch", type=int, default=96, help="responses of a generation batch")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96, help="of each response")
    parser.add_argument("--folder", type=Path, help="where the versions are written, and deleted in the end")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
