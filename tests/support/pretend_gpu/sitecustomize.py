"""In a folder that is put on PYTHONPATH: torch says that a GPU is there, unless CUDA_VISIBLE_DEVICES hides it.

As with the real one, the variable counts as it is when torch is first asked, not later. Whoever then uses the GPU
fails, for the torch of the tests cannot.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


@functools.cache
def device_count() -> int:
    return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else 1


class PretendGpu(MetaPathFinder):
    """Changes `torch.cuda` once it is loaded, and costs nothing where it is not."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "torch.cuda" else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            module.device_count = device_count
            module.is_available = lambda: device_count() > 0

        spec.loader.exec_module = load_and_change
        return spec


sys.meta_path.insert(0, PretendGpu())
