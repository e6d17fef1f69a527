"""How fast this machine multiplies matrices in float32 and in bfloat16: a fraction of a second, in a child process.

A process of its own, so that whoever asks does not keep torch, or a GPU's context, in memory for the rest of its life.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from megatron_npd.errors import UserError
from megatron_npd.hardware import device

ROWS, INNER, COLUMNS = 64, 1024, 512
"""Small enough for a processor that emulates bfloat16 (1 GFLOP/s was seen), large enough for one that has it."""
ROUNDS = 5


@dataclass(frozen=True)
class MatrixRates:
    """What a role of a run would compute on here."""

    device: str
    """`cpu`, or the name of the GPU."""
    float32: float | None = None
    """GFLOP/s of a matrix product; None on a GPU, where it decides nothing."""
    bfloat16: float | None = None
    """The same in bfloat16."""
    has_bfloat16: bool = True
    """Whether the device can compute in bfloat16 at all; any processor can, if slowly."""

    @property
    def gain(self) -> float:
        """How many times as fast as in float32 a processor is in bfloat16."""
        assert self.float32 and self.bfloat16, "only processors are measured"
        return self.bfloat16 / self.float32


def measure_rates(threads: int) -> MatrixRates:
    """Ask a child process that uses so many CPU threads.

    Raises:
        UserError: torch cannot be used in this environment.
    """
    # As a role has it (`roles.role_environment`); torch's own default would be every core.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", __name__, str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"models.dtype: matrix products cannot be measured, torch failed: {said[-1]}")
    return MatrixRates(**json.loads(done.stdout.splitlines()[-1]))


def product_seconds(shape: tuple[int, int, int], warmups: int, rounds: int) -> dict[str, list[float]]:
    """How long each product [rows, inner] × [inner, columns] took in this process on its CPU, by dtype, without the
    first `warmups`; the dtypes take turns, so that whatever else the machine does meets both."""
    import torch

    rows, inner, columns = shape
    operands = {
        name: [torch.ones(size, dtype=getattr(torch, name)) for size in ((rows, inner), (inner, columns))]
        for name in ("float32", "bfloat16")
    }
    seconds: dict[str, list[float]] = {name: [] for name in operands}
    for _ in range(warmups + rounds):
        for name, (left, right) in operands.items():
            started = time.perf_counter()
            torch.mm(left, right)
            seconds[name].append(time.perf_counter() - started)
    return {name: taken[warmups:] for name, taken in seconds.items()}


def _measure(threads: int) -> MatrixRates:
    device.settle()
    import torch

    if torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return MatrixRates(torch.cuda.get_device_name(), has_bfloat16=has_bfloat16)
    torch.set_num_threads(threads)
    seconds = product_seconds((ROWS, INNER, COLUMNS), warmups=1, rounds=ROUNDS)
    gflop = 2 * ROWS * INNER * COLUMNS / 1e9
    float32, bfloat16 = (gflop / statistics.median(seconds[dtype]) for dtype in ("float32", "bfloat16"))
    return MatrixRates("cpu", float32, bfloat16)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(int(sys.argv[1])))))
