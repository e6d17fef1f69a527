"""What vLLM must know of us in every process that it starts: the in-place weight update, and openPangu's configuration.

`setup.py` names `register` as a `vllm.general_plugins` entry point: that reaches the worker processes of tensor
parallelism. `RolloutEngine` also calls it, so that one process works from a plain checkout, without installation.
"""

from __future__ import annotations

BACKEND = "megatron_npd"
"""Name of our backend in vLLM's `weight_transfer_config`."""


def register() -> None:
    """Register with vLLM and transformers. May be called any number of times."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megatron_npd.vllm_engine.openpangu_config import register_openpangu

    register_openpangu()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "megatron_npd.vllm_engine.worker", "CheckpointUpdateEngine"
        )
