"""Killing every trainer rank at a random step, and starting again: in the same layout, and in others."""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Inputs, write_prompts
from fabricated_buffer import make_buffer
from megatron_runs import run_ranks, start_ranks
from safetensors.torch import load_file

from megatron_npd.buffer.versions import MANIFEST, published_versions
from megatron_npd.observe.metrics import read_metrics
from megatron_npd.run_directory import RunDirectory, read_json

pytestmark = pytest.mark.slow

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2_INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
DP2 = {"data_parallel_size": 2, "distributed_optimizer": True}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that waits for nobody: warm-up and two rounds, all annotated."""
    from tiny_models import make_llama
    from tiny_tokenizer import make_tokenizer

    root = tmp_path_factory.mktemp("resume")
    for seed, name in enumerate(("teacher", "student")):
        make_llama(root / name, seed, num_hidden_layers=4)
        make_tokenizer(root / name)
    inputs = Inputs(root)
    write_prompts(inputs.train, {f"t{i}": f"What is {i} plus {i}?" for i in range(40)})
    inputs.set("warmup", {"samples_per_prompt": 1, "epochs": 1, "lr": 1e-3})
    inputs.set("rounds", {"count": 2, "epochs_per_round": 2, "publish_at": 0.5})
    inputs.set("training", {"sequence_length": 128, "global_batch_size": 2, "lr": 1e-3, "adam_eps": 1e-5})
    inputs.set("training.checkpoint_interval", 2)
    return make_buffer(inputs)


@pytest.fixture(scope="module")
def uninterrupted(prepared: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = copy_of(prepared, tmp_path_factory.mktemp("uninterrupted") / "run")
    run_ranks(command(run, TP2_SP), 2, run.root / "rendezvous")
    return run


@pytest.fixture(scope="module")
def killed(
    prepared: RunDirectory, uninterrupted: RunDirectory, tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """All ranks got SIGKILL at once, somewhere inside a step."""
    run = copy_of(prepared, tmp_path_factory.mktemp("killed") / "run")
    chosen = random.randrange(3, steps_done(uninterrupted) - 1)
    print(f"killed after step {chosen}")  # pytest shows it when something fails
    ranks = start_ranks(command(run, TP2_SP), 2, run.root / "rendezvous")
    try:
        deadline = time.monotonic() + 300
        while steps_done(run) < chosen:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.01)
        time.sleep(random.random() * 0.1)
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()
    assert chosen <= steps_done(run) < steps_done(uninterrupted)
    return run


def test_the_same_layout_continues_bit_exactly(
    killed: RunDirectory, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    run = copy_of(killed, tmp_path / "run")
    run_ranks(command(run, TP2_SP), 2, run.root / "rendezvous")
    assert published_versions(run) == published_versions(uninterrupted) == [0, 1, 2, 3]
    for version in published_versions(run):
        ours, theirs = (read_json(r.version(version) / MANIFEST) for r in (run, uninterrupted))
        assert ours["files"] == theirs["files"], f"version {version} differs"


@pytest.mark.parametrize("layout", [PP2_INTERLEAVED, DP2, {}], ids=["pp2_interleaved", "dp2", "single"])
def test_another_layout_continues_within_tolerance(
    layout: dict[str, int | bool], killed: RunDirectory, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    run = copy_of(killed, tmp_path / "run")
    run_ranks(command(run, layout), 2 if layout else 1, run.root / "rendezvous")
    ours, theirs, first = student(run), student(uninterrupted), weights(uninterrupted.version(0))
    for name, expected in theirs.items():
        error, change = (ours[name] - expected).norm(), (expected - first[name]).norm()
        assert error <= 1e-5 * expected.norm(), f"{name}: off by {error / expected.norm():.1e} of its norm"
        assert error <= 1e-3 * change, f"{name}: off by {error / change:.1e} of its change"


def test_steps_after_a_restart_are_those_that_were_lost(killed: RunDirectory, uninterrupted: RunDirectory) -> None:
    """The killed run never trained on anything else than the undisturbed one at the same step."""
    theirs = {record["step"]: record for record in step_records(uninterrupted)}
    for record in step_records(killed):
        for name in ("train/loss", "train/grad_norm", "train/response_tokens", "train/lr"):
            assert record[name] == theirs[record["step"]][name]


def command(run: RunDirectory, layout: dict[str, int | bool]) -> list[str]:
    """The trainer in some layout, on a run directory's own configuration."""
    sets = [f"--set=training.{key}={str(value).lower()}" for key, value in layout.items()]
    return [sys.executable, "-m", "megatron_npd.cli", "trainer", str(run.config), *sets]


def copy_of(run: RunDirectory, root: Path) -> RunDirectory:
    shutil.copytree(run.root, root)
    (root / "rendezvous").unlink(missing_ok=True)
    return RunDirectory(root)


def step_records(run: RunDirectory) -> list[dict]:
    folder = run.metrics("trainer").parent
    return [record for record in read_metrics(folder) if record["event"] == "step"] if folder.is_dir() else []


def steps_done(run: RunDirectory) -> int:
    return max((record["step"] for record in step_records(run)), default=0)


def student(run: RunDirectory) -> dict[str, torch.Tensor]:
    return weights(run.student)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        merged |= load_file(file)
    return merged
