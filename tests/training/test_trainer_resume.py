"""Killing every trainer rank at a random step, and starting again: in the same layout, and in others."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fabricated_buffer import make_buffer
from inputs import Inputs, write_prompts
from megatron_runs import run_ranks, start_ranks
from npd_runs import assert_same_versions
from places import SUPPORT
from safetensors.torch import load_file

from megatron_npd.files import read_json
from megatron_npd.process.metrics import read_metrics
from megatron_npd.run_directory import RunDirectory
from megatron_npd.versions.manifest import published_versions

pytestmark = pytest.mark.slow

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SLOW_TRAINER = SUPPORT / "slow_trainer.py"
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
    chosen = random.randrange(3, steps_done(uninterrupted) - 3)
    print(f"killed after step {chosen}")  # pytest shows it when something fails
    ranks = start_ranks(command(run, TP2_SP), 2, run.root / "rendezvous")
    kill_when(ranks, lambda: steps_done(run) >= chosen, later=random.random() * 0.1)
    assert chosen <= steps_done(run) < steps_done(uninterrupted)
    return run


def test_the_same_layout_continues_bit_exactly(
    killed: RunDirectory, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    run = copy_of(killed, tmp_path / "run")
    run_ranks(command(run, TP2_SP), 2, run.root / "rendezvous")
    assert published_versions(run) == published_versions(uninterrupted) == [0, 1, 2, 3]
    assert_same_versions(uninterrupted, run)


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


def test_asked_to_stop_it_loses_nothing(prepared: RunDirectory, uninterrupted: RunDirectory, tmp_path: Path) -> None:
    """Once while it waits for samples, once between two steps; the signal reaches one rank alone."""
    run = copy_of(prepared, tmp_path / "run")
    missing = run.unit("samples", "round_0000", 0)
    missing.rename(tmp_path / "missing")
    total = steps_done(uninterrupted)
    first = stopped(run, signal.SIGUSR1, 0, lambda log: "waiting for samples of round_0000, unit 1" in log)
    (tmp_path / "missing").rename(missing)
    second = stopped(run, signal.SIGTERM, 1, lambda _: steps_done(run) >= first + 3)
    assert 0 < first < second < total
    run_ranks(command(run, TP2_SP), 2, run.root / "rendezvous")
    assert [record["step"] for record in step_records(run)] == list(range(1, total + 1)), "every step once, none twice"
    assert_same_versions(uninterrupted, run)


def stopped(run: RunDirectory, number: signal.Signals, rank: int, when: Callable[[str], bool]) -> int:
    """Start the trainer, send one of its ranks a signal, and see it save everything; returns its last step."""
    log = run.root.with_name(f"{number.name}.log")
    with log.open("w") as file:
        ranks = start_ranks(command(run, TP2_SP), 2, run.root / "rendezvous", file)
    try:
        deadline = time.monotonic() + 300
        while not when(log.read_text()):
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), log.read_text()
            time.sleep(0.01)
        time.sleep(0.5)
        ranks[rank].send_signal(number)
        asked = time.monotonic()
        statuses = [each.wait(60) for each in ranks]
        print(f"{number.name}: left after {time.monotonic() - asked:.1f} s")
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    (run.root / "rendezvous").unlink(missing_ok=True)
    assert statuses == [128 + number] * 2, log.read_text()
    current = run.checkpoints / (run.checkpoints / "latest.txt").read_text().strip()
    assert read_json(current / "run_state.json")["optimizer_steps"] == steps_done(run), "of the very last step"
    assert not list(run.root.glob("*/.staging-*"))
    assert not list(run.status_folder.glob("*.json"))
    return steps_done(run)


def test_rounds_without_a_checkpoint_are_trained_on_again(
    prepared: RunDirectory, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    """Killed in the last round, two versions after its newest checkpoint: their samples are not stale, and the versions
    stay what they are."""
    seldom = TP2_SP | {"checkpoint_interval": 0, "checkpoint_rounds": 5}
    run = copy_of(prepared, tmp_path / "run")
    ranks = start_ranks([sys.executable, str(SLOW_TRAINER), "0.1", *command(run, seldom)[3:]], 2, tmp_path / "meet")
    last_round = len([record for record in step_records(uninterrupted) if record["stage"] != "round_0001"])
    kill_when(ranks, lambda: steps_done(run) > last_round)
    current = run.checkpoints / (run.checkpoints / "latest.txt").read_text().strip()
    assert read_json(current / "run_state.json")["run"]["progress"]["finished"] == ["warmup"]
    assert 2 in published_versions(run)
    run_ranks(command(run, seldom), 2, run.root / "rendezvous")
    assert_same_versions(uninterrupted, run)


def test_killed_while_a_version_is_written(prepared: RunDirectory, uninterrupted: RunDirectory, tmp_path: Path) -> None:
    """No checkpoint is past the lost version, so a restart publishes it, bit-identical."""
    run = copy_of(prepared, tmp_path / "run")
    ranks = start_ranks([sys.executable, str(SLOW_TRAINER), "0.1", *command(run, TP2_SP)[3:]], 2, tmp_path / "meet")
    kill_when(ranks, lambda: bool(list(run.weights.glob(".staging-v000002-*/*.safetensors"))))
    assert published_versions(run) == [0, 1] and list(run.weights.glob(".staging-v000002-*"))
    current = run.checkpoints / (run.checkpoints / "latest.txt").read_text().strip()
    published_after = next(record["step"] for record in publishing_steps(uninterrupted) if record["version"] == 2)
    assert read_json(current / "run_state.json")["optimizer_steps"] < published_after <= steps_done(run)
    run_ranks(command(run, TP2_SP), 2, run.root / "rendezvous")
    assert published_versions(run) == [0, 1, 2, 3]
    assert sorted(path.name for path in run.weights.iterdir()) == [f"v00000{version}" for version in range(4)]
    assert_same_versions(uninterrupted, run)


def kill_when(ranks: list[subprocess.Popen[str]], happened: Callable[[], bool], later: float = 0.0) -> None:
    """Kill every rank so many seconds after something has happened."""
    try:
        deadline = time.monotonic() + 300
        while not happened():
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.01)
        time.sleep(later)
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.communicate()


def test_a_folder_that_cannot_be_written_ends_the_trainer_with_one_line(prepared: RunDirectory, tmp_path: Path) -> None:
    run = copy_of(prepared, tmp_path / "run")
    shutil.rmtree(run.weights, ignore_errors=True)
    run.weights.write_text("not a folder")
    (rank,) = start_ranks(command(run, {}), 1, tmp_path / "meet")
    log = rank.communicate(timeout=120)[0]
    assert rank.returncode == 2, log
    assert "Traceback" not in log
    last = log.strip().splitlines()[-1]
    assert last.startswith("npd: error: ") and "cannot write v000000: Not a directory" in last


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


def publishing_steps(run: RunDirectory) -> list[dict]:
    """What was published, each with the number of steps done before it."""
    step, published = 0, []
    for record in read_metrics(run.metrics("trainer").parent):
        step = record["step"] if record["event"] == "step" else step
        if record["event"] == "publish":
            published.append({"version": record["version"], "step": step})
    return published


def steps_done(run: RunDirectory) -> int:
    return max((record["step"] for record in step_records(run)), default=0)


def student(run: RunDirectory) -> dict[str, torch.Tensor]:
    return weights(run.student)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        merged |= load_file(file)
    return merged
