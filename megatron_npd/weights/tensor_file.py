"""Reading tensors of safetensors files one at a time, with plain reads.

safetensors' own reader for torch maps a file privately, which Linux refuses where the file is larger than memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import TensorFiles
from megatron_npd.safetensors_format import read_header

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Name in a safetensors header -> data type, of those that a model may have here (`hf_checkpoint.FLOAT_TYPES`)."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    begin: int
    """Byte of the file."""
    dtype_name: str
    """As the header has it; one of `DTYPES`, or a type that is not supported."""
    shape: tuple[int, ...]
    nbytes: int

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own. Raises UserError where the file cannot be read."""
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype_name])
        left = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
        try:
            with open(self.path, "rb", buffering=0) as stream:
                stream.seek(self.begin)
                while left:
                    if not (count := stream.readinto(left)):
                        raise UserError(f"{self.path}: was cut short while it was read")
                    left = left[count:]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        return tensor


def stored_tensors(places: TensorFiles) -> dict[str, StoredTensor]:
    """Tensor name -> where it lies, from the headers of safetensors files; no tensor is read.

    Raises:
        UserError: a file cannot be read.
    """
    found: dict[str, StoredTensor] = {}
    for path in sorted(set(places.of.values())):
        try:
            header = read_header(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        for name, stored in header.tensors.items():
            if places.of.get(name) == path:
                found[name] = StoredTensor(path, stored.begin, stored.dtype, stored.shape, stored.end - stored.begin)
    return found
