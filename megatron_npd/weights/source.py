"""Opening the safetensors files of a Hugging Face checkpoint, and reading them one Megatron parameter at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import check_names, tensor_files
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.models.tensor_map import (
    all_hugging_face_names,
    is_tied_copy,
    parameter_map,
)
from megatron_npd.weights.layouts import shard, unshard
from megatron_npd.weights.tensor_file import DTYPES, stored_tensors


@contextlib.contextmanager
def open_checkpoint(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> the open safetensors file that it is read from, for every tensor of a checkpoint."""
    places = tensor_files(folder).of
    with contextlib.ExitStack() as stack:
        files: dict[Path, Any] = {}
        for path in set(places.values()):
            try:
                files[path] = stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        yield {name: files[path] for name, path in places.items()}


def groups_of(dims: ModelDims) -> list[list[str]]:
    """Parameter names by what is read and written together: what comes before the layers, each layer, what comes after.

    The last pipeline stage's copy of tied embeddings is left out: checkpoints do not hold it.
    """
    before: list[str] = []
    layers: list[list[str]] = [[] for _ in range(dims.num_layers)]
    after: list[str] = []
    for name, parameter in parameter_map(dims).items():
        if parameter.layer is not None:
            layers[parameter.layer].append(name)
        elif not is_tied_copy(name, dims):
            (after if layers[0] else before).append(name)
    return [group for group in (before, *layers, after) if group]


def hugging_face_shapes(
    shapes: Mapping[str, tuple[int, ...]], dims: ModelDims
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Parameter name -> Hugging Face name -> shape, of the tensors in Megatron parameters of `shapes`, padded or not.

    Raises:
        ValueError: a parameter cannot have this shape; the text names it.
    """
    mapped, found = parameter_map(dims), {}
    for name, shape in shapes.items():
        try:
            tensors = unshard(mapped[name], [torch.empty(shape, device="meta")], dims)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{name} cannot have shape {shape}: {' '.join(str(error).split())}") from None
        found[name] = {hf_name: tuple(tensor.shape) for hf_name, tensor in tensors.items()}
    return found


class HuggingFaceSource:
    """The tensors of a checkpoint as whole Megatron parameters (tensor parallel size 1), one at a time."""

    def __init__(self, folder: Path, dims: ModelDims):
        """Raises UserError where files, names or data types are not right."""
        self._folder, self._dims = folder, dims
        self._parameters = parameter_map(dims)
        self.places = tensor_files(folder)
        self.tensors = stored_tensors(self.places)
        """By Hugging Face name, where each lies."""
        check_names(str(folder), self.tensors, dims)
        for name in all_hugging_face_names(dims):
            stored = self.tensors[name].dtype_name
            if stored not in DTYPES:
                raise UserError(f"{folder}: tensor {name} is {stored}; must be one of {', '.join(DTYPES)}")

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check every tensor against the shape of its Megatron parameter.

        Raises:
            UserError: naming the first one that differs from what config.json implies.
        """
        for tensors in hugging_face_shapes(shapes, self._dims).values():
            for hf_name, expected in tensors.items():
                found = self.tensors[hf_name].shape
                if found != expected:
                    raise UserError(
                        f"{self._folder}: tensor {hf_name} has shape {found}; must be {expected} to fit config.json"
                    )

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a parameter. Raises UserError where its tensors have several."""
        found = {hf_name: DTYPES[self.tensors[hf_name].dtype_name] for hf_name in self._names(name)}
        if len(set(found.values())) > 1:
            raise UserError(f"{self._folder}: tensors {', '.join(found)} differ in data type; choose one with --dtype")
        return next(iter(found.values()))

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One whole parameter in `dtype`."""
        tensors = [self.tensors[hf_name].read().to(dtype) for hf_name in self._names(name)]
        return shard(self._parameters[name], tensors, self._dims, 0, 1)

    def _names(self, name: str) -> tuple[str, ...]:
        return self._parameters[name].hugging_face
