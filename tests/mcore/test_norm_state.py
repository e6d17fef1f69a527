"""Norms with a state beside their weights, as Transformer Engine's, and without, as ours: checkpoints serve both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore import model as model_module
from megatron_npd.mcore.checkpoint import (
    _load_models,
    _own_writer_of_megatron,
    load_model_only,
    model_state,
    write_common,
)
from megatron_npd.mcore.model import ModelOptions, RMSNorm, build_gpt
from megatron_npd.models.hf_config import ModelDims

DIMS = ModelDims("qwen3", 512, 64, 96, 2, 2, 1, 32, 1e-5, 1e4, 512, True, qk_norm=True)


class NormWithState(RMSNorm):
    """As Transformer Engine's: a tensor of bytes, empty in 16 bit."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass


def built(norm: type[RMSNorm], parallel: Parallel, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(model_module, "RMSNorm", norm)
    return build_gpt(DIMS, parallel, torch.float32, ModelOptions("reference"))


@pytest.mark.slow
@pytest.mark.parametrize(("saved_with", "loaded_with"), [(RMSNorm, NormWithState), (NormWithState, RMSNorm)])
def test_a_checkpoint_of_one_is_loaded_by_the_other(
    saved_with: type[RMSNorm],
    loaded_with: type[RMSNorm],
    parallel: Parallel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = built(saved_with, parallel, monkeypatch)
    has_state = any(name.endswith("q_layernorm._extra_state") for name in models[0].state_dict())
    assert has_state is (saved_with is NormWithState), "this test would show nothing"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_common(folder)
    dist_checkpointing.save({"model": model_state(models)}, str(folder), **_own_writer_of_megatron())
    others = built(loaded_with, parallel, monkeypatch)
    load_model_only(folder, others)
    for (name, ours), (_, theirs) in zip(
        models[0].named_parameters(), others[0].named_parameters(), strict=True
    ):  # fmt: skip
        assert torch.equal(ours, theirs), name


def test_only_norms_lose_theirs(parallel: Parallel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers have it in both: what Megatron's own tools look for stays."""
    keys = {entry.key for entry in nested_values(model_state(built(NormWithState, parallel, monkeypatch)))}
    assert not any("norm._extra_state" in key for key in keys)
    assert any("linear_proj._extra_state" in key for key in keys)


def test_another_difference_is_an_error(parallel: Parallel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = built(RMSNorm, parallel, monkeypatch)
    state = {"0": {name: tensor for name, tensor in models[0].state_dict().items() if "q_layernorm" not in name}}
    with pytest.raises(RuntimeError, match=r"differ in .*q_layernorm\.weight"):
        _load_models(models, state)
