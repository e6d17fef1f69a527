"""The whole pipeline on tiny models: real Megatron at TP 2, real vLLM, real files; then the same buffer again."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import Inputs, write_prompts
from npd_runs import assert_same_versions, npd, train_again
from places import TOOLS
from safetensors.torch import load_file

from megatron_npd.buffer.plan import make_plan
from megatron_npd.config import load_config
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.estimates.rates import read_rates
from megatron_npd.estimates.simulation import simulate
from megatron_npd.estimates.text import role_memories, workers_of
from megatron_npd.estimates.workload import workload
from megatron_npd.files import read_json
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.process.metrics import read_metrics
from megatron_npd.run_directory import RunDirectory
from megatron_npd.versions.manifest import published_versions, verify_version

pytestmark = pytest.mark.slow
VERIFY = TOOLS / "verify_student.py"


@pytest.fixture(scope="module")
def finished(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A finished run: warm-up, two rounds, one refresh between them."""
    root = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(checkpoints, root, dirs_exist_ok=True)
    inputs = Inputs(root)
    write_prompts(inputs.train, {f"t{i}": f"What is {i} plus {i}?" for i in range(24)})
    inputs.set("warmup", {"samples_per_prompt": 1, "epochs": 2, "lr": 1e-2})
    inputs.set("rounds", {"count": 2, "epochs_per_round": 2})
    inputs.set("rollout", {"max_new_tokens": 24, "samples_per_unit": 10, "kv_cache_gib": 0.05, "threads": 1})
    inputs.set("selection", {"reject_truncated": False})  # random models rarely end by themselves
    inputs.set("annotator.threads", 1)
    inputs.set("training", {"tensor_model_parallel_size": 2, "sequence_parallel": True, "sequence_length": 128})
    inputs.set("training.lr", 3e-3)
    inputs.set("training.min_lr", 3e-4)
    inputs.set("training.global_batch_size", 2)
    npd("run", inputs.path)
    return inputs


def test_summary_tells_what_happened(finished: Inputs) -> None:
    summary = json.loads((finished.run / "summary.json").read_text())
    assert summary["rounds"] == 2 and summary["refreshes"] == 1
    rejected = sum(summary["rollouts_rejected"].values())
    assert summary["rollouts_generated"] == summary["rollouts_kept"] + rejected == 48
    assert summary["rollouts_kept"] > 0 and summary["rollouts_rejected"]["degenerate"] > 0
    assert summary["heldout_kl_after"] < summary["heldout_kl_before"]
    assert summary["optimizer_steps"] > 0 and summary["trained_tokens"] > 0
    assert 0 < summary["packing_efficiency"] <= 1
    assert summary["attention_backend"] == "reference"
    assert {"torch", "megatron-core", "transformers"} <= set(summary["versions"])
    assert (finished.run / "report.html").stat().st_size > 10_000


def test_every_version_is_complete_and_evaluated(finished: Inputs) -> None:
    run = RunDirectory(finished.run)
    assert published_versions(run) == [0, 1, 2, 3]
    for version in published_versions(run):
        assert verify_version(run.version(version)).version == version
        assert read_json(run.evaluation(version))["heldout_kl"] > 0


def test_rejected_samples_are_shown_with_scores_and_reasons(finished: Inputs) -> None:
    text = npd("inspect", finished.run, "--rejected")
    assert "DEGENERATE" in text and "Δ-IFD" in text
    scores = [f"nll_{model}_{given}" for model in ("teacher", "student") for given in ("conditional", "unconditional")]
    for line in npd("inspect", finished.run, "--rejected", "--json", "--limit", "3").splitlines():
        sample = json.loads(line)
        assert sample["stage"].startswith("round_"), "rounds come before the warm-up, which has no Δ-IFD"
        assert all(isinstance(sample[name], float) for name in [*scores, "delta_ifd"])


def test_exported_student_answers_as_the_trainers_model(finished: Inputs) -> None:
    command = [sys.executable, str(VERIFY), str(finished.run), "--prompts", "3", "--max-new-tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "agree on 3 answers" in done.stdout


def test_export_is_compared_with_the_very_weights_of_the_checkpoint(finished: Inputs, parallel: Parallel) -> None:
    """Of a float32 run: read into a 16-bit model they would be other weights, and some answers other answers."""
    from gathering import gather_hugging_face

    from megatron_npd.mcore.model import named_parameters

    spec = importlib.util.spec_from_file_location("verify_student", VERIFY)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    run, config = RunDirectory(finished.run), load_config(finished.run / "config.toml")
    model = tool.checkpointed_model(run, config, parallel)
    exported = {name: x for file in run.student.glob("*.safetensors") for name, x in load_file(file).items()}
    weights = dict(gather_hugging_face(named_parameters([model]), read_model_dims(run.student), parallel))
    assert weights.keys() == exported.keys() and len(weights) > 5
    assert all(torch.equal(weights[name], exported[name]) for name in weights)


@pytest.mark.parametrize("role", ["trainer", "annotator", "rollout_teacher", "rollout"])
def test_each_role_takes_the_memory_that_was_estimated(role: str, finished: Inputs) -> None:
    config = finished.config
    dims = (read_model_dims(folder) for folder in (finished.teacher, finished.student))
    estimated = {memory.role: memory.bytes for memory in role_memories(config, *dims, "cpu", make_plan(config, 24, 3))}
    records = read_metrics(finished.run / "metrics")
    peaks = [record["peak_bytes"] for record in records if (record["role"], record["event"]) == (role, "memory")]
    assert max(peaks) == pytest.approx(estimated[role], rel=0.1)


def test_the_run_takes_the_time_that_is_simulated_at_its_rates(finished: Inputs) -> None:
    config, rates = finished.config, read_rates(finished.run)
    plan = make_plan(config, 24, 3)
    simulated = simulate(workload(config, plan, rates), rates, workers_of(config)).seconds
    records = read_metrics(finished.run / "metrics")
    assert seconds_of_run(records) == pytest.approx(simulated, rel=0.25)


def seconds_of_run(records: list[dict[str, Any]]) -> float:
    """From the start of `npd run` to its last record."""
    (begin,) = (r for r in records if (r["role"], r["event"]) == ("supervisor", "start"))
    return max(record["time"] for record in records) - begin["time"] + begin["import_seconds"]


def test_running_again_does_nothing(finished: Inputs) -> None:
    before = {file: file.stat().st_mtime_ns for file in (finished.run / "weights").rglob("*")}
    npd("run", finished.path)
    assert {file: file.stat().st_mtime_ns for file in (finished.run / "weights").rglob("*")} == before


def test_the_same_buffer_trains_bit_identical_weights(finished: Inputs, tmp_path: Path) -> None:
    """Only prompts, rollouts, samples and configuration are copied; the trainer alone does everything again, without
    asserts: what happens inside one, a collective for instance, would be missed by the other ranks."""
    original = RunDirectory(finished.run)
    assert_same_versions(original, train_again(original, tmp_path / "run", "-O"))
