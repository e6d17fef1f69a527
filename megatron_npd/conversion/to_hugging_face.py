"""Megatron torch_dist to Hugging Face."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_npd.conversion.progress_bar import SAMPLE_SECONDS, ProgressBar, Report
from megatron_npd.conversion.staging import identity, staged
from megatron_npd.conversion.to_megatron import HUGGING_FACE
from megatron_npd.data.ahead import Ahead
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import UserError
from megatron_npd.files import read_json, write_json
from megatron_npd.mcore.torch_dist import (
    METADATA,
    CheckpointLayout,
    TorchDistReader,
    checkpoint_layout,
    find_checkpoint,
)
from megatron_npd.models.hf_config import ModelDims, read_model_dims
from megatron_npd.models.tensor_map import parameter_map
from megatron_npd.process.memory import PeakMemory
from megatron_npd.weights.companions import copy_companions
from megatron_npd.weights.layouts import unshard
from megatron_npd.weights.safetensors_writer import TensorSpec, is_written, plan_files, write_file, write_index
from megatron_npd.weights.source import groups_of, hugging_face_shapes
from megatron_npd.weights.tensor_file import DTYPES

GIGABYTE = 10**9


def to_hugging_face(
    source: Path,
    output: Path,
    parallel: Parallel,
    template: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * GIGABYTE,
    overwrite: bool = False,
) -> Report:
    """Convert the checkpoint in `source`. Called again after a kill, it goes on where it was.

    Args:
        source: a torch_dist checkpoint, converted or a trainer's, or a trainer's `checkpoints` folder.
        parallel: of this single process (`mcore.model_parallel.initialize`).
        template: Hugging Face folder to take configuration and tokenizer from; None: the one in `source`.
        dtype: of all tensors; None: as they are.
        max_shard_bytes: of the tensors in one file.

    Raises:
        UserError: the checkpoint is not whole or not of this model, or `output` cannot be written; nothing is lost.
    """
    checkpoint = find_checkpoint(source)
    template = template_of(checkpoint, template)
    dims = read_model_dims(template)
    stored = StoredModel(TorchDistReader(checkpoint), checkpoint_layout(dims, parallel), dims)
    with PeakMemory(period_seconds=SAMPLE_SECONDS) as peak:
        specs = stored.specs(dtype)
        shards = plan_files(list(specs.values()), max_shard_bytes)
        total = sum(shard.nbytes for shard in shards)
        progress = ProgressBar("megatron-to-hf", total)
        job = _job(checkpoint, template, dtype, max_shard_bytes)
        with staged(output, [checkpoint, template], job, overwrite, total) as staging:
            wanted = [shard for shard in shards if not is_written(staging, shard)]
            for shard in shards:
                if shard not in wanted:
                    progress.found(len(shard.tensors), shard.nbytes)
            stored.will_read(spec.name for shard in wanted for spec in shard.tensors)

            def tensor(name: str) -> torch.Tensor:
                progress.wrote(specs[name].nbytes)
                return stored.read(name).to(specs[name].dtype)

            for shard in wanted:
                write_file(staging, shard, tensor)
            write_index(staging, shards)
            copy_companions(template, staging)
            set_dtype(staging / "config.json", max(specs.values(), key=lambda spec: spec.nbytes).dtype)
        progress.close()
    return progress.report(peak.nbytes)


class StoredModel:
    """The Hugging Face tensors in a torch_dist checkpoint, read one Megatron parameter at a time."""

    def __init__(self, reader: TorchDistReader, layout: CheckpointLayout, dims: ModelDims):
        """Raises UserError where the checkpoint does not hold a model of `dims`."""
        reader.check(layout)
        self._reader, self._layout, self._dims = reader, layout, dims
        self._parameters = parameter_map(dims)
        self._home: dict[str, str] = {}  # Hugging Face name -> the parameter it is a part of, in the model's order
        self._shapes = self._checked_shapes()
        self._parts: dict[str, torch.Tensor] = {}
        self.will_read([])

    def specs(self, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
        """All tensors, by name, in the order of the model; `dtype` None: as they are stored."""
        found = {}
        for hf_name, name in self._home.items():
            stored = self._reader.dtype(self._layout.places[name])
            if (dtype or stored) not in DTYPES.values():
                raise UserError(f"{self._reader.folder}: {name} is {stored}; choose another data type with --dtype")
            found[hf_name] = TensorSpec(hf_name, self._shapes[hf_name], dtype or stored)
        return found

    def will_read(self, hf_names: Iterable[str]) -> None:
        """Announce all reads to come, so that one parameter can be read ahead."""
        parameters = (name for name, _ in itertools.groupby(self._home[hf_name] for hf_name in hf_names))
        self._name, self._parameter = "", Ahead(parameters, self._read_parameter)

    def read(self, hf_name: str) -> torch.Tensor:
        """One tensor, in the announced order. Those of one parameter should come one after another: it is read once."""
        name = self._home[hf_name]
        if name != self._name:
            self._parts = {}  # free the last one before the next is there
            self._name, self._parts = name, self._parameter(name)
        return self._parts[hf_name]

    def _read_parameter(self, name: str) -> dict[str, torch.Tensor]:
        return unshard(self._parameters[name], [self._reader.read(self._layout.places[name])], self._dims)

    def _checked_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape; what is stored may be padded, and differ in nothing else from the model's."""
        places = {name: self._layout.places[name] for group in groups_of(self._dims) for name in group}
        stored_shapes = {name: self._reader.shape(place) for name, place in places.items()}
        try:
            stored = hugging_face_shapes(stored_shapes, self._dims)
        except ValueError as error:
            raise UserError(f"{self._reader.folder}: {error}; config.json must be that of this checkpoint") from None
        wanted = hugging_face_shapes({name: place.shape for name, place in places.items()}, self._dims)
        shapes = {}
        for name, tensors in wanted.items():
            if stored[name] != tensors:
                raise UserError(
                    f"{self._reader.folder}: {name} has shape {stored_shapes[name]}, config.json implies "
                    f"{places[name].shape}; it must be that of this checkpoint"
                )
            shapes |= tensors
            self._home |= dict.fromkeys(tensors, name)
        return shapes


def template_of(checkpoint: Path, template: Path | None) -> Path:
    """The folder with a checkpoint's Hugging Face configuration.

    Raises:
        UserError: none is named and the checkpoint carries none.
    """
    template = template or checkpoint / HUGGING_FACE
    if not (template / "config.json").is_file():
        hint = "" if template != checkpoint / HUGGING_FACE else "; name a Hugging Face folder with --template"
        raise UserError(f"{template}: holds no config.json{hint}")
    return template


def set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Make a config.json name the data type of the weights beside it, under the key it uses; else leave it as it is."""
    config = read_json(path)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    name = str(dtype).removeprefix("torch.")
    if any(config.get(key) != name for key in keys):
        write_json(path, config | dict.fromkeys(keys, name))


def _job(checkpoint: Path, template: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> dict[str, Any]:
    return {
        "direction": "megatron-to-hf",
        "input": identity([checkpoint / METADATA, *sorted(checkpoint.glob("*.distcp"))]),
        "template": identity([template / "config.json"]),
        "dtype": str(dtype),
        "max_shard_size": max_shard_bytes,
    }
