"""Registers our in-place weight update with vLLM, in every process that vLLM starts.

`setup.py` names `register` as a `vllm.general_plugins` entry point: that reaches the worker processes of tensor
parallelism. `RolloutEngine` also calls it, so that one process works from a plain checkout, without installation.
"""

from __future__ import annotations

BACKEND = "megatron_npd"
"""Name of our backend in vLLM's `weight_transfer_config`."""


def register() -> None:
    """Tell vLLM where `CheckpointUpdateEngine` is. May be called any number of times; imports nothing heavy."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "megatron_npd.rollout.worker", "CheckpointUpdateEngine")
