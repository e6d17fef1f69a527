"""What the tests of real vLLM engines share: small engines, versions, requests. transformers is the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EOS, make_model, probe_sequences, publish

from megatron_npd.config import RolloutConfig
from megatron_npd.versions.manifest import read_manifest, write_manifest
from megatron_npd.vllm_engine.engine import Request, RolloutEngine

ROLLOUT = RolloutConfig(kv_cache_gib=0.02, max_num_seqs=32, threads=1)
LONGEST = 200
"""Tokens of a sequence."""
TOLERANCE = 1e-4
"""Nats a token, in float32."""
_seeds = itertools.count(100)


def start(folder: Path, version: int) -> RolloutEngine:
    """An engine in float32; the test that starts one needs the fixture `engines_live_on`."""
    return RolloutEngine(folder, version, ROLLOUT, "float32", LONGEST)


def published(folder: Path, version: int, family: str = "llama", **options: Any) -> Path:
    """A new random version in `folder`/vN."""
    return publish(make_model(family, folder / f"v{version:06d}", next(_seeds), **options), version)


def refresh(engine: RolloutEngine, folder: Path, version: int | None = None) -> None:
    """Serve the version in `folder`, by default the one after the served one."""
    with engine.stage(folder, engine.version + 1 if version is None else version) as staged:
        engine.refresh(staged)


def requests(count: int = 8, length: int = 12, **options: Any) -> list[Request]:
    """Requests for up to 40 tokens each."""
    settings = {"max_new_tokens": 40, "stop_token_ids": [EOS]} | options
    return [Request(ids, seed, **settings) for seed, ids in enumerate(probe_sequences(7, count, length))]


def largest_difference(ours: list[list[float]], reference: list[list[float]]) -> float:
    """Of paired logprobs, nats."""
    return float(np.abs(np.concatenate(ours) - np.concatenate(reference)).max())


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change(tensors)` to a version's last weight file, and write a manifest that is true of the result."""
    file = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    write_manifest(folder, read_manifest(folder).version)
