"""The CUDA kernels on the host: builds csrc/emulation.cpp and calls it on torch tensors as the operators are called."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from places import ROOT

CSRC = ROOT / "megatron_npd" / "kernels" / "csrc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
"""In the order of the emulation's `dtype`."""
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
POISON = 12345.0


def build(folder: Path) -> Path:
    """The library, compiled unless one of these very sources lies in the folder."""
    flags = FLAGS + (["-mfma", "-mf16c"] if platform.machine() == "x86_64" else [])
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((flags, version, platform.machine())).encode())
    for source in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh")]):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    library = folder / f"emulation-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{threading.get_native_id()}.tmp")
        subprocess.run(["g++", *flags, CSRC / "emulation.cpp", "-o", unfinished], check=True)
        unfinished.rename(library)
    return library


class Emulation:
    """The operators, by the kernels. Every call runs twice, threads in ascending and in descending order between
    barriers, on results filled with poison, and must give the same bits.

    `splits`: blocks that share a row, which the launchers choose by the device.
    """

    def __init__(self, library: Path):
        self.c = ctypes.CDLL(str(library))
        self.lock = threading.Lock()  # there is one emulated block in a process

    def score(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None = None,
        first: int = 0,
        valid: int | None = None,
        inverse_temperature: float = 1.0,
        splits: int = 1,
    ) -> torch.Tensor:
        def run(descending: bool) -> tuple[torch.Tensor]:
            result = _poisoned(3, len(logits))
            labels = (_at(targets), _at(mask), ctypes.c_float(inverse_temperature))
            self.c.npd_score(*_logits(logits, first, valid), *labels, _at(result), splits, descending)
            return (result,)

        return self._in_both_orders(run)[0]

    def topk(
        self,
        logits: torch.Tensor,
        k: int,
        first: int = 0,
        valid: int | None = None,
        inverse_temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        def run(descending: bool) -> tuple[torch.Tensor, ...]:
            results = _poisoned(len(logits), k), torch.full((len(logits), k), -(2**62)), _poisoned(2, len(logits))
            given = (*_logits(logits, first, valid), k, ctypes.c_float(inverse_temperature))
            self.c.npd_topk(*given, *map(_at, results), descending)
            return results

        return self._in_both_orders(run)

    def loss_statistics(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        ids: torch.Tensor,
        p: torch.Tensor,
        first: int = 0,
        valid: int | None = None,
        inverse_temperature: float = 1.0,
        splits: int = 1,
    ) -> torch.Tensor:
        def run(descending: bool) -> tuple[torch.Tensor]:
            result = _poisoned(4 if inverse_temperature == 1 else 5, len(logits))
            labels = (_at(targets), _at(ids), _at(p), ids.shape[1], ctypes.c_float(inverse_temperature))
            self.c.npd_loss_statistics(*_logits(logits, first, valid), *labels, _at(result), splits, descending)
            return (result,)

        return self._in_both_orders(run)[0]

    def loss_gradient_(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        ids: torch.Tensor,
        p: torch.Tensor,
        coefficients: torch.Tensor,
        first: int = 0,
        valid: int | None = None,
        inverse_temperature: float = 1.0,
        splits: int = 1,
    ) -> None:
        def run(descending: bool) -> tuple[torch.Tensor]:
            into = _copy_of_storage(logits)
            labels = (_at(targets), _at(ids), _at(p), ids.shape[1], _at(coefficients))
            scale = ctypes.c_float(inverse_temperature)
            self.c.npd_loss_gradient(*_logits(into, first, valid), *labels, scale, splits, descending)
            return (_whole_storage(into),)

        _whole_storage(logits).copy_(self._in_both_orders(run)[0])

    def splits(self, rows: int, columns: int, per_vector: int, multiprocessors: int) -> int:
        """What the launchers choose."""
        return self.c.npd_splits(ctypes.c_int64(rows), ctypes.c_int64(columns), per_vector, multiprocessors)

    def _in_both_orders(self, run: Callable[[bool], Any]) -> Any:
        with self.lock:
            one, other = run(False), run(True)
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), "the order of threads shows in the result"
        return one


def _poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, POISON)


def _at(x: torch.Tensor | None) -> ctypes.c_void_p | None:
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def _logits(x: torch.Tensor, first: int, valid: int | None) -> tuple[Any, ...]:
    """The first arguments of every function on logits: dtype, pointer, Shape."""
    assert x.stride(1) == 1 or x.shape[1] <= 1
    valid = x.shape[1] if valid is None else valid
    return DTYPES.index(x.dtype), _at(x), (ctypes.c_int64 * 5)(x.stride(0), x.shape[0], x.shape[1], first, valid)


def _whole_storage(x: torch.Tensor) -> torch.Tensor:
    """All elements that share memory with x, one after the other."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def _copy_of_storage(x: torch.Tensor) -> torch.Tensor:
    """The same view of a copy, so that strides and alignment are the same too."""
    return _whole_storage(x).clone().as_strided(x.shape, x.stride(), x.storage_offset())
