"""Loading a checkpoint into vLLM from the files that all other roles read it from.

vLLM itself takes every tensor of every file that the index lists, whichever comes last, and prefers Mistral's
`consolidated*.safetensors` to the index's files where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from megatron_npd.models.hf_checkpoint import tensor_files


class IndexedLoader(DefaultModelLoader):
    """vLLM's loader of safetensors, each tensor from its one file."""

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Any]]:
        places = tensor_files(Path(source.model_or_path)).of
        for path in sorted(set(places.values())):
            with safe_open(path, framework="pt") as file:
                for name in (name for name, of in places.items() if of == path):
                    yield source.prefix + name, file.get_tensor(name)

    def download_model(self, model_config: Any) -> None:
        """Nothing: checkpoints lie on this filesystem."""
