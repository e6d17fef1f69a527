#!/usr/bin/env python3
"""Whether every part of a GPU environment can be imported here: one line each. See tools/make_gpu_env.sh.

Exit status: 0; 1 if a part that every run needs cannot be.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable


def torch() -> str:
    module = importlib.import_module("torch")
    if module.version.cuda is None:
        raise ImportError(f"torch {module.__version__} is no CUDA build")
    return f"{module.__version__}, for CUDA {module.version.cuda}"


def kernels() -> str:
    build = importlib.import_module("megatron_npd.kernels.build")
    library = build.library_file("cuda")
    if not library.is_file():
        raise ImportError("not built; the plain torch reference would run, several times slower")
    importlib.import_module("torch").ops.load_library(str(build.library_file("cpu")))
    importlib.import_module("torch").ops.load_library(str(library))
    return library.name


def version_of(name: str) -> Callable[[], str]:
    return lambda: str(getattr(importlib.import_module(name), "__version__", "imported"))


PARTS: dict[str, tuple[Callable[[], str], bool]] = {
    "torch": (torch, True),
    "Megatron-Core": (version_of("megatron.core"), True),
    "vLLM": (version_of("vllm"), True),
    "transformers": (version_of("transformers"), True),
    "Transformer Engine": (version_of("transformer_engine.pytorch"), False),
    "fused CUDA kernels": (kernels, False),
    "megatron_npd": (version_of("megatron_npd"), True),
}
"""Part -> what imports it, and whether every run needs it."""


def main() -> int:
    lacks_needed = False
    for name, (load, is_needed) in PARTS.items():
        try:
            print(f"ok: {name}: {load()}", flush=True)
        except Exception as error:  # a compiled extension may fail in any way when its CUDA does not fit
            reason = " ".join(str(error).split())[:300]
            print(f"{'MISSING' if is_needed else 'missing'}: {name}: {type(error).__name__}: {reason}", flush=True)
            lacks_needed = lacks_needed or is_needed
    return 1 if lacks_needed else 0


if __name__ == "__main__":
    sys.exit(main())
