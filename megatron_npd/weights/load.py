"""Loading a Hugging Face checkpoint into this rank's Megatron parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import check_names
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.models.tensor_map import MappedParameter, parameter_map
from megatron_npd.weights.layouts import shard
from megatron_npd.weights.source import open_checkpoint


def load_hugging_face(
    parameters: Mapping[str, torch.Tensor], folder: str | Path, dims: ModelDims, parallel: Parallel
) -> None:
    """Copy a checkpoint into `parameters` (names as `mcore.model.named_parameters` gives them), cast to their dtype.

    Nothing is copied before every name and shape was found right.

    Raises:
        UserError: a tensor is missing, superfluous or of the wrong shape, or a file cannot be read.
    """
    mapped = parameter_map(dims)
    with open_checkpoint(Path(folder)) as files:
        check_names(str(folder), files, dims)
        for name, parameter in parameters.items():
            if _shard(files, folder, mapped[name], dims, parallel, shape_only=True) != tuple(parameter.shape):
                raise UserError(f"{folder}: {name} does not fit the dimensions in config.json")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(_shard(files, folder, mapped[name], dims, parallel))


def _shard(
    files: dict[str, Any],
    folder: str | Path,
    parameter: MappedParameter,
    dims: ModelDims,
    parallel: Parallel,
    shape_only: bool = False,
) -> Any:
    """This rank's shard of one parameter, or with `shape_only` its shape without reading data."""
    tensors = []
    for hf_name in parameter.hugging_face:
        if shape_only:
            tensors.append(torch.empty(files[hf_name].get_slice(hf_name).get_shape(), device="meta"))
        else:
            tensors.append(files[hf_name].get_tensor(hf_name))
    try:
        mine = shard(parameter, tensors, dims, parallel.tp_rank, parallel.tp_size)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: {', '.join(parameter.hugging_face)}: wrong shape ({error})") from None
    return tuple(mine.shape) if shape_only else mine
