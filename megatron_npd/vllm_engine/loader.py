"""Loading a checkpoint into vLLM from the files that all other roles read it from.

vLLM itself takes every tensor of every file that the index lists, whichever comes last, and prefers Mistral's
`consolidated*.safetensors` to the index's files where there are any. How files are read stays its own: on a network
filesystem it fetches them ahead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

from megatron_npd.models.hf_checkpoint import tensor_files


class IndexedLoader(DefaultModelLoader):
    """vLLM's loader of safetensors, each tensor from its one file."""

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Any]]:
        self.counter_before_loading_weights = time.perf_counter()  # it logs the seconds since
        found = tensor_files(Path(source.model_or_path))
        files = sorted({str(path) for path in found.of.values()})
        for group in [[file] for file in files] if found.left_out else [files]:  # one by one where copies are passed by
            options = (self.load_config.use_tqdm_on_load, self.load_config.safetensors_load_strategy)
            for name, tensor in safetensors_weights_iterator(group, *options):
                if str(found.of.get(name)) in group:
                    yield source.prefix + name, tensor

    def download_model(self, model_config: Any) -> None:
        """Nothing: checkpoints lie on this filesystem."""
