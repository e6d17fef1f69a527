"""Real Megatron-Core in several processes: the same training whatever the layout, and exact resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_llama

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("megatron_worker.py")


@dataclass(frozen=True)
class Outcome:
    """What a training run leaves: a record a step, and the model in Hugging Face names before and after."""

    history: list[dict[str, float]]
    loaded: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 heads in 3 groups and 131 tokens: at TP 2 both heads and vocabulary are padded."""
    return make_llama(
        tmp_path_factory.mktemp("student"),
        0,
        tied=True,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=131,
        num_hidden_layers=2,
    )


@pytest.fixture(scope="module")
def single(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process: what every layout must reproduce."""
    return train(checkpoint, tmp_path_factory.mktemp("single"))


def train(checkpoint: Path, out: Path, world_size: int = 1, steps: int = 3, **job: Any) -> Outcome:
    """Run the worker on `world_size` processes and collect what it wrote."""
    job |= {"checkpoint": str(checkpoint), "out": str(out), "steps": steps}
    common = os.environ | {
        "WORLD_SIZE": str(world_size),
        "NPD_RENDEZVOUS": str(out / "rendezvous"),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(job)],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        logs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(logs)[-6000:]

    def stages(name: str) -> dict[str, torch.Tensor]:
        merged: dict[str, torch.Tensor] = {}
        for file in sorted(out.glob(f"{name}_*.safetensors")):
            merged |= load_file(file)
        return merged

    return Outcome(json.loads((out / "history.json").read_text()), stages("loaded"), stages("trained"))


LAYOUTS = {
    "tp2_sp": {"world_size": 2, "tp": 2, "sp": True},
    "pp2": {"world_size": 2, "pp": 2},
    "dp2": {"world_size": 2},
    "dp2_distributed_optimizer": {"world_size": 2, "distributed_optimizer": True},
    "other_packs": {"samples_per_pack": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_training_in_every_layout(layout: str, checkpoint: Path, single: Outcome, tmp_path: Path) -> None:
    other = train(checkpoint, tmp_path, **LAYOUTS[layout])
    original = load_file(checkpoint / "model.safetensors")
    assert set(other.loaded) == set(original)
    assert all(torch.equal(other.loaded[name], original[name]) for name in original)  # bit-exact round trip
    for step, (ours, theirs) in enumerate(zip(other.history, single.history, strict=True)):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), f"loss of step {step}"
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4), f"gradient norm of step {step}"
    for name, tensor in single.trained.items():
        # Adam's first steps are about ±lr whatever the gradient's size, so rounding shows in near-zero gradients.
        torch.testing.assert_close(other.trained[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(tensor, original[name]), f"{name} was not trained"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_restores_everything(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    """One step too many after the checkpoint, and back: bit-identical to the undisturbed run."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "disturbed").mkdir()
    plain = train(checkpoint, tmp_path / "plain", dtype=dtype, **LAYOUTS["tp2_sp"])
    disturbed = train(
        checkpoint, tmp_path / "disturbed", dtype=dtype, checkpoint_at=1, disturb_at=1, **LAYOUTS["tp2_sp"]
    )
    assert plain.history == disturbed.history
    assert all(torch.equal(plain.trained[name], disturbed.trained[name]) for name in plain.trained)


def test_resuming_the_distributed_optimizer_is_refused_not_wrong(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"distributed_optimizer = true: .* cannot be resumed"):
        train(checkpoint, tmp_path, checkpoint_at=1, disturb_at=1, **LAYOUTS["dp2_distributed_optimizer"])
