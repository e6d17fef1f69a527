"""What vLLM must know of us in every process: our loader, the in-place weight update, openPangu's configuration.

`setup.py` names `register` as a `vllm.general_plugins` entry point: that reaches the worker processes of tensor
parallelism. `RolloutEngine` also calls it, so that one process works from a plain checkout, without installation.
"""

from __future__ import annotations

BACKEND = "megatron_npd"
"""Name of our backend in vLLM's `weight_transfer_config`."""
LOAD_FORMAT = "megatron_npd"
"""Name of our loader in vLLM's `load_format`."""


def register() -> None:
    """Register with vLLM and transformers. May be called any number of times."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor import model_loader

    from megatron_npd.vllm_engine.openpangu_config import register_openpangu

    register_openpangu()
    if LOAD_FORMAT not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        from megatron_npd.vllm_engine.loader import IndexedLoader

        model_loader.register_model_loader(LOAD_FORMAT)(IndexedLoader)
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "megatron_npd.vllm_engine.worker", "CheckpointUpdateEngine"
        )
