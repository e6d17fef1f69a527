"""Megatron-Core on a machine without a GPU: the one place that redirects its "cuda" calls to the CPU.

Megatron-Core allocates on `torch.cuda.current_device()` and keeps CUDA random states. With no GPU, `install` sends
those calls to the CPU for the rest of the process; communication is gloo. Nothing is changed where a GPU is there.
Proved on megatron-core 0.16 to 0.19.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)
_installed: TorchFunctionMode | None = None


def install() -> None:
    """Redirect once; does nothing on a machine with a GPU or when called again."""
    global _installed
    if _installed is not None or torch.cuda.is_available():
        return
    logger.info("no GPU: Megatron-Core runs on the CPU over gloo")
    _redirect_torch_cuda()
    _redirect_rng_tracker()
    _installed = _CudaToCpu()
    _installed.__enter__()


class _CudaToCpu(TorchFunctionMode):
    """Rewrites "cuda" devices in torch calls to "cpu"."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Every call of every step comes by here: what most of them are not is asked first.
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if func in _SPECIAL:
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                # Gradient clipping sorts gradients by type names such as torch.cuda.FloatTensor.
                return func(*args).replace("torch.", "torch.cuda.")
            if func is torch.Tensor.to:
                args = tuple("cpu" if _is_cuda(argument) else argument for argument in args)
        return func(*args, **kwargs) if kwargs else func(*args)


_SPECIAL = frozenset({torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to})


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


class _NoStream:
    """A stream on a device without streams: everything is done when the call returns."""

    def __init__(self, *_: Any, **__: Any): ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


def _redirect_torch_cuda() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda *_, **__: None
    cuda.current_stream = lambda *_: _NoStream()
    cuda.Stream = _NoStream  # a class, because others annotate with `torch.cuda.Stream | None`
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.reset_peak_memory_stats = lambda *_, **__: None


def _redirect_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
