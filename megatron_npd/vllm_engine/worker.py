"""The part of an update that runs inside vLLM's workers: load a whole checkpoint over the served weights.

Everything that can be wrong with the checkpoint is found beforehand, by `versions.staged.stage_version`. What remains
here happens in one worker call, between two engine steps, because a step on half-loaded (meta) weights kills the
engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Nothing is set up before the first update."""


@dataclass
class CheckpointFiles(WeightTransferUpdateInfo):
    """One update: every safetensors file of a verified version, as absolute paths all workers can read."""

    files: list[str]


class CheckpointUpdateEngine(WeightTransferEngine):
    """Loads a complete checkpoint in one `update_weights` call; the calls around it do nothing."""

    init_info_cls = NoInitInfo
    update_info_cls = CheckpointFiles
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Nothing: the model is touched in `receive_weights` only."""

    def receive_weights(self, update_info: CheckpointFiles) -> None:
        """Replace every weight of the model.

        Raises:
            RuntimeError: a parameter was not loaded. The model is then mixed and must not serve again.
        """
        initialize_layerwise_reload(self.model)
        self.model.load_weights(checkpoint_tensors(update_info.files))
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_embeddings(self.model)
        unloaded = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if unloaded:
            more = f" and {len(unloaded) - 5} more" if unloaded[5:] else ""
            raise RuntimeError(f"parameters without a value after an update: {', '.join(unloaded[:5])}{more}")

    def finish_weight_update(self) -> None:
        """Nothing: `receive_weights` left the model complete."""

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def checkpoint_tensors(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, CPU tensor) of every tensor, one at a time."""
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, tensors.get_tensor(name)


def repack_tied_embeddings(model: torch.nn.Module) -> None:
    """Rebuild what embeddings that share one weight derived from it.

    On a CPU vLLM packs the output head's weight for its matrix product when it is loaded. A tied head has no weight
    of its own in the checkpoint, so vLLM's reload passes it over and it goes on computing with the old packed copy.
    """
    sharing: dict[int, list[VocabParallelEmbedding]] = {}
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            sharing.setdefault(module.weight.data_ptr(), []).append(module)
    for modules in sharing.values():
        if len(modules) > 1:
            for module in modules:
                module.quant_method.process_weights_after_loading(module)
