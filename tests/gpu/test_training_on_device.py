"""The trainer on a GPU: the CPU's steps, its own again after a resume, and its weights as they are published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron_runs import Outcome, assert_same_training, train, train_all
from safetensors.torch import load_file
from tiny_models import make_model

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.hardware.device import VISIBLE
from megatron_npd.mcore.attention import choose_backend
from megatron_npd.mcore.model import ModelOptions, build_gpt, named_parameters
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.run_directory import RunDirectory
from megatron_npd.weights.load import load_hugging_face
from megatron_npd.weights.publish import Publisher

FAMILIES = {"llama": {"tied": True, "num_hidden_layers": 2}, "qwen3": {"num_hidden_layers": 2}}
EPSILON = {"adam_eps": 1e-5}
"""Smooth in the gradient: see `assert_same_training`."""


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without and with query and key norms."""
    return make_model(request.param, tmp_path_factory.mktemp("student") / "model", 0, **FAMILIES[request.param])


JOBS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "block": {"training": {"recompute": "block", "recompute_layers": 1}},
}


def with_epsilon(job: dict) -> dict:
    return job | {"training": EPSILON | job.get("training", {})}


@pytest.fixture(scope="module")
def on_both(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Outcome]]:
    """Device -> job -> outcome."""
    jobs = {name: with_epsilon(job) for name, job in JOBS.items()}
    outcomes = {"gpu": train_all(jobs, checkpoint, tmp_path_factory.mktemp("gpu"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VISIBLE, "")
        outcomes["cpu"] = train_all(jobs, checkpoint, tmp_path_factory.mktemp("cpu"))
    return outcomes


@pytest.mark.parametrize("job", ["float32", "block"])
def test_float32_steps_are_the_cpus(job: str, on_both: dict[str, dict[str, Outcome]]) -> None:
    assert_same_training(on_both["gpu"][job], on_both["cpu"]["float32"], relative=2e-5)


def test_bfloat16_steps_are_the_cpus_to_rounding(on_both: dict[str, dict[str, Outcome]]) -> None:
    """Each device is as far from float32 as the other."""
    exact, gpu, cpu = on_both["cpu"]["float32"], on_both["gpu"]["bfloat16"], on_both["cpu"]["bfloat16"]
    for right, ours, theirs in zip(exact.history, gpu.history, cpu.history, strict=True):
        for name in ("loss", "norm"):
            allowed = max(2 * abs(theirs[name] - right[name]), 0.01 * right[name])
            assert abs(ours[name] - right[name]) < allowed, name


@pytest.mark.parametrize("way", [{}, {"dtype": "bfloat16", "deterministic": True}], ids=["float32", "deterministic"])
def test_resuming_leaves_no_trace(way: dict, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 every kernel of a step is deterministic; flash attention's backward is where that is asked for."""
    if "deterministic" in way:  # what `supervise.role_work` gives a role
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    jobs = {"plain": way, "disturbed": way | {"checkpoint_at": 1, "disturb_at": 1}}
    outcomes = train_all(jobs, checkpoint, tmp_path)
    plain, disturbed = outcomes["plain"], outcomes["disturbed"]
    assert plain.history == disturbed.history
    assert all(torch.equal(plain.trained[name], disturbed.trained[name]) for name in plain.trained)


def test_two_gpus_train_as_one(checkpoint: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    layouts = {"cp2": {"cp": 2}, "tp2_sp": {"tp": 2, "sp": True}, "dp2": {"distributed_optimizer": True}}
    single = train(checkpoint, tmp_path / "single", training=EPSILON)
    jobs = {name: with_epsilon(layout) for name, layout in layouts.items()}
    for outcome in train_all(jobs, checkpoint, tmp_path / "two", world_size=2).values():
        assert_same_training(outcome, single, relative=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_published_weights_are_those_on_the_device(
    dtype: torch.dtype, checkpoint: Path, parallel: Parallel, tmp_path: Path
) -> None:
    assert parallel.device.startswith("cuda")
    dims = read_model_dims(checkpoint)
    models = build_gpt(dims, parallel, dtype, ModelOptions(choose_backend("auto", dtype)))
    load_hugging_face(named_parameters(models), checkpoint, dims, parallel)
    run = RunDirectory(tmp_path)
    publisher = Publisher(run, named_parameters(models), dims, parallel, checkpoint)
    publisher.publish(0, named_parameters(models))
    publisher.wait()
    original = load_file(checkpoint / "model.safetensors")
    published = {}
    for file in run.version(0).glob("*.safetensors"):
        published |= load_file(file)
    assert published.keys() == original.keys()
    assert all(torch.equal(published[name], original[name].to(dtype)) for name in original)
