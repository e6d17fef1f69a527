"""Opening the safetensors files of a Hugging Face checkpoint, and reading them one Megatron parameter at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_npd.errors import UserError
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.weights.name_map import (
    all_hugging_face_names,
    hugging_face_names,
    is_tied_copy,
    rules_for,
    unknown_hugging_face_names,
)
from megatron_npd.weights.tensor_file import DTYPES, stored_tensors

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index lists and those beside them.

    Raises:
        UserError: there is none, or one that the index lists is missing.
    """
    paths = set(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        try:
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            paths |= {folder / name for name in listed}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / INDEX}: must be JSON with a weight_map of file names") from None
    if not paths:
        raise UserError(f"{folder}: holds no *.safetensors file; must be a Hugging Face checkpoint")
    for path in sorted(paths):
        if not path.is_file():
            raise UserError(f"{path}: no such file, though {INDEX} lists it")
    return sorted(paths)


@contextlib.contextmanager
def open_checkpoint(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> open safetensors file, for every file of a checkpoint."""
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error})") from None
            tensors.update(dict.fromkeys(file.keys(), file))
        yield tensors


def check_names(folder: Path, found: set[str], dims: ModelDims) -> None:
    """Raise UserError where tensors are missing or unknown."""
    missing = sorted(set(all_hugging_face_names(dims)) - found)
    for what, names in (("missing", missing), ("not known to this family", unknown_hugging_face_names(found, dims))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder}: tensor {names[0]}{more} {what}")


def groups_of(dims: ModelDims) -> list[list[str]]:
    """Parameter names by what is read and written together: what comes before the layers, each layer, what comes after.

    The last pipeline stage's copy of tied embeddings is left out: checkpoints do not hold it.
    """
    before: list[str] = []
    layers: list[list[str]] = [[] for _ in range(dims.num_layers)]
    after: list[str] = []
    for name, (rule, layer) in rules_for(dims).items():
        if "{layer}" in rule.megatron:
            layers[layer].append(name)
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
    rules, found = rules_for(dims), {}
    for name, shape in shapes.items():
        rule, layer = rules[name]
        try:
            tensors = rule.layout.unshard([torch.empty(shape, device="meta")], dims)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{name} cannot have shape {shape}: {' '.join(str(error).split())}") from None
        found[name] = {n: tuple(t.shape) for n, t in zip(hugging_face_names(rule, layer), tensors, strict=True)}
    return found


class HuggingFaceSource:
    """The tensors of a checkpoint as whole Megatron parameters (tensor parallel size 1), one at a time."""

    def __init__(self, folder: Path, dims: ModelDims):
        """Raises UserError where files, names or data types are not right."""
        self._folder, self._dims = folder, dims
        self._rules = rules_for(dims)
        self.tensors = stored_tensors(weight_files(folder))
        """By Hugging Face name, where each lies."""
        check_names(folder, set(self.tensors), dims)
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
        rule, _ = self._rules[name]
        tensors = [self.tensors[hf_name].read().to(dtype) for hf_name in self._names(name)]
        return rule.layout.shard(tensors, self._dims, 0, 1)

    def _names(self, name: str) -> list[str]:
        return hugging_face_names(*self._rules[name])
