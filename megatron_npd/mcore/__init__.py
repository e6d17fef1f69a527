"""The one door to Megatron-Core, Transformer Engine and apex."""

import warnings
from typing import Any

import torch

from megatron_npd.hardware import device

# Megatron-Core warns at import about every optional GPU package; mcore.cpu and mcore.attention say once what is used.
warnings.filterwarnings("ignore", module=r"megatron\.core.*")
# Its loading of checkpoints makes torch warn about a class of torch's own.
warnings.filterwarnings("ignore", message="Please use DTensor instead")


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """torch.compile that compiles nothing, as decorator with and without arguments."""
    return _as_it_is if function is None else function


device.settle()
if not torch.cuda.is_available():
    # Megatron decorates functions with torch.compile, which loads TorchInductor: two fifths of a process's start, for
    # functions that no model on a CPU uses.
    _compile, torch.compile = torch.compile, _as_it_is
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = _compile
