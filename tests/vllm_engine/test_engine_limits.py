"""Bounds of our configuration are those of the installed vLLM: what it refuses, or changes without a word."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
from engines import LONGEST
from inputs import Inputs
from places import SUPPORT
from pydantic import ValidationError
from tiny_models import make_llama

from megatron_npd.config import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.prepare.machine import check_machine, least_cache_bytes
from megatron_npd.vllm_engine.start import BATCHED_TOKENS

pytestmark = pytest.mark.slow


def bounds(name: str) -> dict[str, Any]:
    """ge, gt, le of a key of `rollout`."""
    found = {}
    for rule in RolloutConfig.model_fields[name].metadata:
        for kind in ("ge", "gt", "le"):
            if hasattr(rule, kind):
                found[kind] = getattr(rule, kind)
    return found


def test_temperature() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    least, most = bounds("temperature")["ge"], bounds("temperature")["le"]
    for accepted in (least, most):
        assert SamplingParams(temperature=accepted).temperature == accepted
    with pytest.raises(VLLMValidationError, match="temperature"):
        SamplingParams(temperature=math.nextafter(most, 3))
    below = math.nextafter(least, 0)
    assert SamplingParams(temperature=below).temperature != below, "vLLM takes another, and says so in its log alone"


def test_top_p() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    assert bounds("top_p") == {"gt": 0.0, "le": 1.0}
    assert SamplingParams(top_p=1.0).top_p == 1.0 and SamplingParams(top_p=5e-324).top_p > 0
    for refused in (0.0, math.nextafter(1, 2)):
        with pytest.raises(VLLMValidationError, match="top_p"):
            SamplingParams(top_p=refused)


def test_share_of_a_gpus_memory() -> None:
    from vllm.config import CacheConfig

    assert bounds("gpu_memory_utilization") == {"gt": 0.0, "le": 1.0}
    assert CacheConfig(gpu_memory_utilization=1.0).gpu_memory_utilization == 1.0
    for refused in (0.0, math.nextafter(1, 2)):
        with pytest.raises(ValidationError, match="gpu_memory_utilization"):
            CacheConfig(gpu_memory_utilization=refused)


def test_sequences_at_once() -> None:
    from vllm.config import SchedulerConfig

    most = bounds("max_num_seqs")["le"]
    assert most == BATCHED_TOKENS

    def scheduler(sequences: int) -> SchedulerConfig:
        return SchedulerConfig(
            max_num_batched_tokens=BATCHED_TOKENS,
            max_num_seqs=sequences,
            max_model_len=LONGEST,
            is_encoder_decoder=False,
        )

    assert scheduler(most).max_num_seqs == most
    with pytest.raises(ValidationError, match="max_num_seqs"):
        scheduler(most + 1)


STARTED = """
import sys
from pathlib import Path

from engines import requests
from megatron_npd.config import load_config
from megatron_npd.vllm_engine.engine import RolloutEngine

config = load_config(sys.argv[1])
engine = RolloutEngine(Path(config.models.teacher), -1, config.rollout, "float32", 150)
(response,) = engine.generate(requests(1, length=120, max_new_tokens=30, stop_token_ids=[]))
print("tokens", len(response.ids))
"""


def test_least_cache_of_a_cpu(inputs: Inputs) -> None:
    """The engine starts and generates with just what the check asks for, and with a byte less does neither."""
    make_llama(inputs.teacher, seed=0, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3)
    inputs.set("prompts.max_prompt_tokens", 120)
    inputs.set("rollout.max_new_tokens", 30)
    inputs.set("annotator.pack_length", 256)
    inputs.set("training.sequence_length", 256)
    inputs.set("rollout.threads", 1)
    teacher, student = map(read_model_dims, (inputs.teacher, inputs.student))
    least = least_cache_bytes(inputs.config, teacher)

    def start(size: int) -> subprocess.CompletedProcess[str]:
        """In a process of its own: an engine that did not start leaves vLLM's process groups half made."""
        inputs.set("rollout.kv_cache_gib", size / 2**30)
        command = [sys.executable, "-c", STARTED, str(inputs.path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    refused = start(least - 1)
    assert refused.returncode == 1 and "KV cache" in refused.stderr, refused.stderr[-2000:]
    with pytest.raises(
        UserError, match=r"rollout.kv_cache_gib = .*: must hold one sequence of 151 tokens of the teacher"
    ):
        check_machine(inputs.config, teacher, student)
    started = start(least)
    assert "tokens 30" in started.stdout, started.stderr[-2000:]
    check_machine(inputs.config, teacher, student)
