"""The fused operators `torch.ops.megatron_npd.*`: loaded once a process, used where they run, never when stale.

    NPD_REQUIRE_KERNELS=1   an error where the plain torch reference would run for want of a library
    NPD_DISABLE_KERNELS=1   always the reference
    NPD_CPU_ISA=NAME        scalar, avx2 or avx512 instead of the best one of this machine

What runs is said in the log when it is first used. Operators dispatch on the tensors' device, so callers ask `runs` and
call one function. Schemas: csrc/ops.cpp.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch

from megatron_npd.errors import UserError

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of logits that the operators take."""

MOST_TOPK, MOST_LOSS_IDS = MappingProxyType({"cuda": 64}), MappingProxyType({"cuda": 512})
"""Device type -> the largest k of `topk`, and the most ids a token of the loss. Any number elsewhere."""

_lock = threading.Lock()
_obstacles: dict[str, str | None] = {}
"""Device type -> why its operators can't run, None where they can. Found when first asked for."""
_disabled = 0
"""How many `disabled()` are open, in whatever thread."""


def runs(logits_TV: torch.Tensor, k: int = 0, most: Mapping[str, int] = MappingProxyType({})) -> bool:
    """Whether the operators take these logits, and `k` ids where a device takes the `most` of its type.

    Raises:
        UserError: they can't run on this device, and NPD_REQUIRE_KERNELS=1; or NPD_CPU_ISA names nothing that runs.
    """
    takes = logits_TV.dtype in DTYPES and (logits_TV.shape[1] <= 1 or logits_TV.stride(1) == 1)
    device = logits_TV.device.type
    return takes and k <= most.get(device, k) and run_on(device)


def run_on(device: str) -> bool:
    """Whether the operators run on devices of this type; raises as `runs` does."""
    if _disabled:
        return False
    with _lock:
        if device not in _obstacles:
            _obstacles[device] = _load(device)
        return _obstacles[device] is None


@contextmanager
def disabled() -> Iterator[None]:
    """The reference instead of the operators, in every thread, until the block ends."""
    global _disabled
    with _lock:
        _disabled += 1
    try:
        yield
    finally:
        with _lock:
            _disabled -= 1


def score(logits_TV: torch.Tensor, targets_T: torch.Tensor, first: int, valid: int) -> torch.Tensor:
    """float32 [3, T]: the largest logit m of this rank, Σ exp(z - m), the target's logit (0 on other ranks)."""
    return torch.ops.megatron_npd.score(logits_TV.detach(), targets_T.contiguous(), None, first, valid, 1.0)


def topk(
    logits_TV: torch.Tensor, k: int, first: int, valid: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's k best logits, float32 [T, K], and their ids; m and Σ exp((z - m) / τ) outside them, [2, T]."""
    return torch.ops.megatron_npd.topk(logits_TV.detach(), k, first, valid, 1 / temperature)


def loss_statistics(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    ids_TK: torch.Tensor,
    p_TK: torch.Tensor,
    first: int,
    valid: int,
    temperature: float,
) -> torch.Tensor:
    """`objective.partial_statistics`."""
    small = (targets_T.contiguous(), ids_TK.contiguous(), p_TK.contiguous())
    return torch.ops.megatron_npd.loss_statistics(logits_TV.detach(), *small, first, valid, 1 / temperature)


def loss_gradient_(
    logits_TV: torch.Tensor,
    targets_T: torch.Tensor,
    ids_TK: torch.Tensor,
    p_TK: torch.Tensor,
    coefficients_8T: torch.Tensor,
    first: int,
    valid: int,
    temperature: float,
) -> None:
    """Overwrite logits by `objective.write_gradient`'s result."""
    small = (targets_T.contiguous(), ids_TK.contiguous(), p_TK.contiguous(), coefficients_8T.contiguous())
    torch.ops.megatron_npd.loss_gradient_(logits_TV, *small, first, valid, 1 / temperature)


def _load(device: str) -> str | None:
    """Load what the device needs and say so; else why not, said too."""
    required, switched_off = _is_set("NPD_REQUIRE_KERNELS"), _is_set("NPD_DISABLE_KERNELS")
    if required and switched_off:
        raise UserError("NPD_REQUIRE_KERNELS=1 and NPD_DISABLE_KERNELS=1: set at most one of them")
    obstacle = "NPD_DISABLE_KERNELS=1" if switched_off else _load_libraries(device)
    if obstacle and required:
        raise UserError(f"NPD_REQUIRE_KERNELS=1: the fused operators can't run on {device}: {obstacle}")
    if obstacle:
        logger.warning("kernels on %s: plain torch, which is several times slower: %s", device, obstacle)
        return obstacle
    isa = f" ({_choose_isa()})" if device == "cpu" else ""
    logger.info("kernels on %s: fused operators%s", device, isa)
    return None


def _load_libraries(device: str) -> str | None:
    """The CPU library defines the operators for every device; CUDA's adds its implementations."""
    if device not in ("cpu", "cuda"):
        return "there are none for it"
    return _load_library("cpu") or (_load_library("cuda") if device == "cuda" else None)


def _load_library(kind: str) -> str | None:
    # Not on top: `python -m megatron_npd.kernels.build` must find its module not yet imported.
    from megatron_npd.kernels import build

    path = build.library_file(kind)
    if not path.exists():
        others = [other.name for other in build.other_builds(kind)]
        what = f"{others[0]} was built from other sources" if others else f"{path} is missing"
        return f"{what}; build it with `{build.COMMAND}`"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]  # torch names the file, the linker what is wrong with it
        return f"{path} can't be loaded: {reason}; remove it and build it again with `{build.COMMAND}`"
    return None


def _choose_isa() -> str:
    name = os.environ.get("NPD_CPU_ISA", "")
    try:
        return torch.ops.megatron_npd.cpu_isa(name)
    except ValueError as error:
        raise UserError(f"NPD_CPU_ISA = {error}") from None


def _is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")
