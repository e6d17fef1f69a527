"""Starting vLLM inside this process: what it reads from the environment, and the options this role needs."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from packaging.version import Version

from megatron_npd.config import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.hardware import device
from megatron_npd.vllm_engine.plugin import BACKEND, LOAD_FORMAT, register

BATCHED_TOKENS = 8192
"""Most prompt tokens computed at once on a CPU, unless a single prompt is longer."""
SEQUENCES = 256
"""Sequences decoded at once on a CPU, unless `rollout.max_num_seqs` says otherwise."""
OLDEST_VLLM = (0, 32)
"""The first whose outputs say by which weights they were sampled (`CompletionOutput.weight_versions`)."""


def start_vllm(
    folder: Path, rollout: RolloutConfig, dtype: str, max_model_len: int, updatable: bool, trust_remote_code: bool
) -> Any:
    """A `vllm.LLMEngine` in this process, in seconds on a CPU: nothing is compiled there, nothing is profiled.

    Raises:
        UserError: vLLM is missing, too old, or built for another device than this process has.
    """
    on_cpu = _prepare_environment(rollout.threads)
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    register()
    if on_cpu:
        sizes = {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
            # A prompt cut into chunks winds back its seeded generator, which torch's CPU generator cannot do.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(max_model_len, BATCHED_TOKENS),
            "max_num_seqs": rollout.max_num_seqs or SEQUENCES,
        }
    else:
        sizes = {
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
            "max_num_seqs": rollout.max_num_seqs or None,  # None: vLLM's choice for this GPU
        }
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(folder),
            load_format=LOAD_FORMAT,
            config_format="hf",  # or a params.json beside config.json would count
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            max_model_len=max_model_len,
            tensor_parallel_size=rollout.tensor_model_parallel_size,
            skip_tokenizer_init=True,
            generation_config="vllm",  # no sampling defaults from the checkpoint
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=True,
            weight_transfer_config={"backend": BACKEND} if updatable else None,
            use_tqdm_on_load=False,
            disable_log_stats=True,
            **sizes,
        ),
        UsageContext.LLM_CLASS,  # without it a GPU gets the small batches of a server that must answer soon
    )


def _require_recent_vllm() -> None:
    """Refuse a vLLM that would fail only after a whole unit was sampled."""
    installed = device.installed_vllm()
    if installed is None:
        return  # `device.require_vllm_fits` says it
    name, version = installed.split()
    if Version(version).release < OLDEST_VLLM:
        oldest = ".".join(map(str, OLDEST_VLLM))
        raise UserError(f"{name} = {version}: must be {oldest} or later, which says what weights sampled a response")


def _prepare_environment(threads: int) -> bool:
    """Set what vLLM reads from the environment, before it is imported; return whether it runs on the CPU.

    What the user set stands, but for what this role cannot work without.
    """
    # OpenMP threads that spin while they wait make a shared core ten times slower. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Workers of an engine over several GPUs. Forked, they could not use CUDA, which this process has asked for devices.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # And CUDA is asked through NVML, which leaves it alone: no context of ours on a GPU that a worker is to fill.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    device.settle()
    _require_recent_vllm()
    import torch
    import torch._dynamo

    on_cpu = not torch.cuda.is_available()
    device.require_vllm_fits(gpu=not on_cpu)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if on_cpu:
        # Sampling would wait half a minute for a C++ compiler. The variable counts only before dynamo's import.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        torch._dynamo.config.disable = True
        # Not bound to cores: the roles of one machine would all be given the same ones.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    # Each start on a CPU prints a dozen warnings about optional parts that it lacks.
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if on_cpu else "WARNING").upper()
    logging.getLogger("vllm").setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    return on_cpu
