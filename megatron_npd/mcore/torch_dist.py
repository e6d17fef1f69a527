"""Where a model's parameters lie in a Megatron torch_dist checkpoint, and reading them there one at a time.

Layers of one shape share one stored tensor with a layer axis in front: `decoder.layers.mlp.linear_fc2.weight` is
[layers, hidden, ffn]. It is stored in chunks, at least one a layer and rank; which ones is the writer's choice, so any
tensor and pipeline parallel size can load it. Keys, shapes and offsets are asked of Megatron itself, whose model is
built without memory, so they are those that a trainer would write.
"""

from __future__ import annotations

import io
import math
import pickle
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, maybe_load_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    FileSystemReader,
    LoadPlan,
    Metadata,
    ReadItem,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import UserError
from megatron_npd.mcore.checkpoint import LATEST, latest_checkpoint, model_state
from megatron_npd.mcore.model import ModelOptions, build_gpt, named_parameters
from megatron_npd.models.hf_config import ModelDims

BACKEND, BACKEND_VERSION = "torch_dist", 1
METADATA = ".metadata"
OPTIMIZER_PREFIX = "optimizer"
"""Stored tensors with such keys are the optimizer's (`mcore.optimizer_state`)."""


@dataclass(frozen=True)
class Place:
    """Where one parameter lies: a block of the tensor stored under `key`."""

    key: str
    offset: tuple[int, ...]
    """Of the block's first element in the stored tensor: the layer number and zeros, or zeros."""
    stored_shape: tuple[int, ...]
    """Of the whole stored tensor."""
    shape: tuple[int, ...]
    """Of the parameter, at tensor parallel size 1."""

    @property
    def block(self) -> tuple[int, ...]:
        """`shape` with the stored tensor's number of dimensions."""
        return (1,) * (len(self.stored_shape) - len(self.shape)) + self.shape


@dataclass(frozen=True)
class CheckpointLayout:
    """Everything a checkpoint of one model holds, but the optimizer's part."""

    places: dict[str, Place]
    """Parameter name, as `mcore.model.named_parameters` has it -> its place. Tied embeddings are stored once."""
    objects: dict[str, bytes]
    """Key -> serialised object: a layer's state beside its weights, which only 8-bit arithmetic uses. Empty ones."""


def checkpoint_layout(dims: ModelDims, parallel: Parallel) -> CheckpointLayout:
    """The layout of a model's checkpoint. `parallel`: of one process, as `mcore.model_parallel.initialize` gives it."""
    with torch.device("meta"):
        [model] = build_gpt(dims, replace(parallel, device="meta"), torch.float32, ModelOptions("reference"))
    names = {parameter: name for name, parameter in named_parameters([model]).items()}
    places, objects = {}, {}
    for entry in nested_values(model_state([model])):
        if isinstance(entry, ShardedObject):
            objects[entry.unique_key] = _serialised(entry.data)
        else:
            places[names[entry.data]] = _place(entry)
    return CheckpointLayout(places, objects)


def _place(entry: Any) -> Place:
    """A factory describes a parameter in parts, such as the gate and up rows: its block begins where the first does."""
    parts = list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
    offset = tuple(map(min, zip(*(part.global_offset for part in parts), strict=True)))
    place = Place(parts[0].key, offset, tuple(parts[0].global_shape), tuple(entry.data.shape))
    assert sum(part.data.numel() for part in parts) == math.prod(place.shape), f"{place}: its parts are something else"
    return place


def _serialised(value: Any) -> bytes:
    """As Megatron writes an object: its shards as a list."""
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream.getvalue()


def find_checkpoint(path: Path) -> Path:
    """`path` if it is a torch_dist checkpoint, or the current one of a trainer's `checkpoints` folder.

    Raises:
        UserError: neither.
    """
    if (path / LATEST).is_file():
        path = latest_checkpoint(path) or path
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; must be a torch_dist checkpoint")
    try:
        backend = getattr(maybe_load_config(str(path)), "sharded_backend", None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path / CONFIG_FNAME}: cannot be read ({error})") from None
    if backend is None:
        raise UserError(f"{path}: not a torch_dist checkpoint: holds neither {CONFIG_FNAME} nor {LATEST}")
    if backend != BACKEND:
        raise UserError(f"{path / CONFIG_FNAME}: sharded_backend {backend!r} is not supported; must be {BACKEND!r}")
    return path


class TorchDistReader:
    """Reads blocks of the tensors of one checkpoint, at whatever parallel layout it was saved."""

    def __init__(self, folder: Path):
        """Raises UserError where `folder` has no readable index of its tensors."""
        self.folder = folder
        self._reader = FileSystemReader(folder)
        metadata = _read_metadata(folder / METADATA)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not key.startswith(OPTIMIZER_PREFIX)
        }

    def check(self, layout: CheckpointLayout) -> None:
        """Check that the checkpoint holds this model's tensors, for as many layers; shapes are the caller's to check.

        Raises:
            UserError: a tensor is missing or unknown, or there are more or fewer layers.
        """
        known = {place.key for place in layout.places.values()}
        rule = "the Hugging Face config.json must be that of this checkpoint"
        for what, keys in (("is missing", known - self._tensors.keys()), ("is unknown", self._tensors.keys() - known)):
            if keys:
                more = f" ({len(keys)} in all)" if len(keys) > 1 else ""
                raise UserError(f"{self.folder}: tensor {min(keys)} {what}{more}; {rule}")
        for place in layout.places.values():
            axes, size = len(place.stored_shape) - len(place.shape), tuple(self._tensors[place.key].size)
            if len(size) != len(place.stored_shape) or size[:axes] != place.stored_shape[:axes]:
                raise UserError(
                    f"{self.folder}: tensor {place.key} has shape {size}, and not {place.stored_shape}; {rule}"
                )

    def dtype(self, place: Place) -> torch.dtype:
        """Data type a parameter is stored in."""
        return self._tensors[place.key].properties.dtype

    def shape(self, place: Place) -> tuple[int, ...]:
        """Shape a parameter is stored in; more than `place.shape` where heads or vocabulary are padded."""
        return tuple(self._tensors[place.key].size[len(place.stored_shape) - len(place.shape) :])

    def read(self, place: Place) -> torch.Tensor:
        """One parameter, in the shape and data type it is stored in.

        Raises:
            UserError: a file is missing or damaged, or its chunks do not cover the parameter.
        """
        stored, shape = self._tensors[place.key], self.shape(place)
        axes = len(stored.size) - len(shape)
        block = ChunkStorageMetadata(torch.Size(place.offset), torch.Size((1,) * axes + shape))
        items = create_read_items_for_chunk_list(place.key, stored, [block])
        if sum(math.prod(item.lengths) for item in items) != math.prod(shape):
            raise UserError(
                f"{self.folder}: the chunks of {place.key} at {list(place.offset)} do not add up to {shape}"
            )
        tensor = torch.empty(block.sizes, dtype=stored.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        except (OSError, RuntimeError, AssertionError, EOFError, pickle.UnpicklingError) as error:
            text = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
            raise UserError(f"{self.folder}: {place.key} cannot be read ({text})") from None
        return tensor.view(shape)


class _Into(DefaultLoadPlanner):
    """Lets a reader put every piece into its part of one tensor."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        parts = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._tensor[tuple(slice(start, start + length) for start, length in parts)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class _MetadataUnpickler(pickle.Unpickler):
    """Reads an index and runs nothing: a checkpoint may come from anywhere, and a pickle can name any function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if module.startswith(_MODULES_OF_RECORDS) and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong there")


_PLAIN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}
_MODULES_OF_RECORDS = (
    "torch.distributed.checkpoint.",
    "torch.distributed._shard.",
    "megatron.core.dist_checkpointing.",
)


def _read_metadata(path: Path) -> Metadata:
    try:
        with open(path, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is not complete") from None
    except Exception as error:  # whatever a damaged pickle raises
        raise UserError(f"{path}: not a readable index of a torch_dist checkpoint ({error})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path}: not an index of a torch_dist checkpoint")
    return metadata
