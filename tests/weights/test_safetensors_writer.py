"""Weight files written tensor by tensor, read by safetensors' own reader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import tensor_files
from megatron_npd.weights.safetensors_writer import TensorSpec, is_written, plan_files, write_file, write_index
from megatron_npd.weights.tensor_file import stored_tensors


def test_shards_are_planned_by_size_and_read_by_safetensors(tmp_path: Path) -> None:
    """Mixed data types of odd lengths, an empty tensor, one that is larger than a file may be."""
    tensors = {
        "a": torch.randn(7).bfloat16(),
        "b": torch.randn(3, 5),
        "c": torch.empty(0, 4),
        "d": torch.randn(100).half(),
        "e": torch.randn(1, 1, 3).bfloat16(),
        "f": torch.randn(2),
    }
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    shards = plan_files(specs, 80)
    assert [[tensor.name for tensor in shard.tensors] for shard in shards] == [["b", "c", "a"], ["d"], ["f", "e"]]
    for shard in shards:
        assert not is_written(tmp_path, shard)
        write_file(tmp_path, shard, tensors.__getitem__)
        assert is_written(tmp_path, shard)
    write_index(tmp_path, shards)
    stored = stored_tensors(tensor_files(tmp_path))
    assert stored.keys() == tensors.keys()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    assert index["weight_map"]["d"] == "model-00002-of-00003.safetensors"
    for name, file in index["weight_map"].items():
        for found in (load_file(tmp_path / file)[name], stored[name].read()):
            assert found.dtype == tensors[name].dtype and torch.equal(found, tensors[name])


def test_an_unfinished_or_other_shard_is_not_taken_for_written(tmp_path: Path) -> None:
    [shard] = plan_files([TensorSpec("a", (4,), torch.float32)], 100)
    assert shard.file == "model.safetensors"
    with pytest.raises(RuntimeError, match="interrupted"):
        write_file(tmp_path, shard, lambda _: (_ for _ in ()).throw(RuntimeError("interrupted")))
    assert not is_written(tmp_path, shard)
    write_file(tmp_path, shard, lambda _: torch.ones(4))
    assert is_written(tmp_path, shard)
    assert not is_written(tmp_path, plan_files([TensorSpec("b", (4,), torch.float32)], 100)[0])
    os.truncate(tmp_path / shard.file, (tmp_path / shard.file).stat().st_size - 1)
    assert not is_written(tmp_path, shard)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    [shard] = plan_files([TensorSpec("a", (4,), torch.float32)], 100)
    write_file(tmp_path, shard, lambda _: torch.ones(4))
    stored = stored_tensors(tensor_files(tmp_path))["a"]
    os.truncate(stored.path, stored.begin + 5)
    with pytest.raises(UserError, match="was cut short while it was read"):
        stored.read()
    stored.path.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        stored.read()
