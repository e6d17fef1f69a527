"""A model's weights as Hugging Face tensors, gathered one parameter at a time: what publishing must come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.models.tensor_map import is_tied_copy, parameter_map
from megatron_npd.weights.layouts import unshard
from megatron_npd.weights.snapshot import gather_shards


def gather_hugging_face(
    parameters: Mapping[str, torch.Tensor], dims: ModelDims, parallel: Parallel
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, full CPU tensor) of this stage's parameters; a collective over the tensor-parallel group.

    Yields on tensor-parallel rank 0 only; the other ranks take part and yield nothing. A tensor may share memory with
    its parameter.
    """
    mapped = parameter_map(dims)
    for name, parameter in parameters.items():
        if is_tied_copy(name, dims):
            continue
        for shards in gather_shards([parameter.detach()], parallel, owner=0):
            for hf_name, tensor in unshard(mapped[name], shards, dims).items():
                yield hf_name, tensor.cpu().contiguous()
