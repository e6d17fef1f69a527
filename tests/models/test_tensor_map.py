"""Hugging Face → every rank's Megatron shard → Hugging Face is bit-exact, padding included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_llama, make_model

from megatron_npd.distributed.parallel import SINGLE
from megatron_npd.errors import UserError
from megatron_npd.models.families.family import Layout
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.models.tensor_map import is_tied_copy, parameter_map
from megatron_npd.weights.layouts import shard, unshard
from megatron_npd.weights.load import load_hugging_face

AWKWARD = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 131}
"""Three key-value groups and 131 rows: TP 2 and 4 pad both."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_round_trip_is_bit_exact(family: str, tied: bool, size: int, tmp_path: Path) -> None:
    folder = make_model(family, tmp_path / "model", 0, tied=tied, **AWKWARD)
    dims, original = read_model_dims(folder), load_file(folder / "model.safetensors")
    back: dict[str, torch.Tensor] = {}
    for name, parameter in parameter_map(dims).items():
        names = parameter.hugging_face
        shards = [shard(parameter, [original[n] for n in names], dims, rank, size) for rank in range(size)]
        assert len({each.shape for each in shards}) == 1, f"{name}: ranks hold different shapes"
        if parameter.layout != Layout.REPLICATED:  # what was added to make the ranks' shares equal is zero
            nonzero = sum(int(each.count_nonzero()) for each in shards)
            assert nonzero == sum(int(original[n].count_nonzero()) for n in names), name
        if not is_tied_copy(name, dims):
            back |= unshard(parameter, shards, dims)
    assert set(back) == set(original)
    for name, tensor in original.items():
        assert torch.equal(back[name], tensor), name


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "tensor model.extra is not known to the llama family"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), "decoder.final_layernorm.weight does not fit"),
    ],
)
def test_a_wrong_checkpoint_changes_nothing(change, message: str, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", 0)
    dims = read_model_dims(folder)
    parameters = {
        name: torch.full_like(
            shard(parameter, [load_file(folder / "model.safetensors")[n] for n in parameter.hugging_face], dims, 0, 1),
            7.0,
        )
        for name, parameter in parameter_map(dims).items()
    }
    spoil(folder, change)
    with pytest.raises(UserError, match=message):
        load_hugging_face(parameters, folder, dims, SINGLE)
    assert all((parameter == 7.0).all() for parameter in parameters.values())


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", 0)
    dims = read_model_dims(folder)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
        load_hugging_face({}, folder, dims, SINGLE)
