"""Activations computed again in the backward: the same gradients bit for bit, and as many layers twice as asked for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.mcore.model import ModelOptions, build_gpt, forward_packed
from megatron_npd.models.hf_config import ModelDims

DIMS = ModelDims("qwen3", 512, 64, 96, 3, 2, 1, 32, 1e-5, 1e4, 512, True, qk_norm=True)
BOUNDS = np.array([0, 7, 8, 40], dtype=np.int32)
WAYS = {
    "none": (ModelOptions("reference"), 0),
    "selective": (ModelOptions("reference", recompute="selective"), 0),
    "block of one": (ModelOptions("reference", recompute="block", recompute_layers=1), 1),
    "block of two": (ModelOptions("reference", recompute="block", recompute_layers=2), 2),
    "block of more than there are": (ModelOptions("reference", recompute="block", recompute_layers=9), 3),
    "full": (ModelOptions("reference", recompute="full"), 3),
}


@pytest.fixture(scope="module")
def weights(parallel: Parallel) -> dict[str, torch.Tensor]:
    [model] = build_gpt(DIMS, parallel, torch.float32, ModelOptions("reference"))
    return model.state_dict()


def gradients(
    options: ModelOptions, parallel: Parallel, weights: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], Counter[int]]:
    """Of each parameter, and how often each layer ran."""
    [model] = build_gpt(DIMS, parallel, torch.float32, options)
    model.load_state_dict(weights)
    runs: Counter[int] = Counter()
    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
    hidden = forward_packed(model, torch.arange(40) * 7 % 512, BOUNDS, torch.arange(40), parallel)
    hidden.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, runs


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_what_is_kept(way: str, parallel: Parallel, weights: dict[str, Any]) -> None:
    options, again = WAYS[way]
    expected, _ = gradients(ModelOptions("reference"), parallel, weights)
    got, runs = gradients(options, parallel, weights)
    assert runs == {number: 2 if number < again else 1 for number in range(DIMS.num_layers)}
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            assert torch.equal(got[name], gradient), name
