"""The examples: each says what the paper's recipe says, renders, passes the check, and runs scaled down."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
import scaled_examples
from fabricated_buffer import make_buffer
from finished_run import check_finished
from npd_runs import npd, run_trainer
from places import EXAMPLES
from scaled_examples import NAMES

from megatron_npd.buffer.plan import make_plan
from megatron_npd.cli import main
from megatron_npd.config import Config, load_config
from megatron_npd.estimates.division import Sizes, best_division
from megatron_npd.estimates.parameters import stage_parameters
from megatron_npd.estimates.rates import AnnotatorRates, LaunchRates, Rates, RolloutRates, SampleRates, TrainerRates
from megatron_npd.estimates.simulation import Workers, simulate
from megatron_npd.estimates.text import role_memories
from megatron_npd.estimates.workload import workload
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.prepare.dtype import decide_dtype
from megatron_npd.slurm.placement import place_roles
from megatron_npd.slurm.script import render
from megatron_npd.versions.manifest import published_versions, verify_version

LARGEST = "openpangu_72b_to_7b"
"""On four nodes; its rendered script lies beside it."""
MEMORY = {
    "trainer": ("parameters", "gradients", "Adam's moments", "main weights", "activations", "logits"),
    "annotator": ("teacher", "student", "one layer's activations", "logits"),
    "rollout": ("parameters", "key-value cache", "logits"),
}
"""Role -> terms of its memory that the check prints."""


def test_there_are_five() -> None:
    assert NAMES == [
        "openpangu_72b_to_7b",
        "openpangu_7b_to_1b",
        "qwen2.5_coder_7b_to_1.5b",
        "qwen2.5_math_7b_to_1.5b",
        "qwen3_8b_to_0.6b",
    ]
    assert all((EXAMPLES / name / "README.md").is_file() for name in NAMES)


DIVISIONS = {
    "openpangu_72b_to_7b": (16, 12, 4),
    "openpangu_7b_to_1b": (4, 3, 1),
    "qwen2.5_coder_7b_to_1.5b": (4, 2, 2),
    "qwen2.5_math_7b_to_1.5b": (4, 2, 2),
    "qwen3_8b_to_0.6b": (2, 4, 2),
}
"""GPUs that train, annotate and sample."""
PROMPT_AND_RESPONSE = {
    "openpangu_72b_to_7b": (200, 800),
    "openpangu_7b_to_1b": (200, 800),
    "qwen2.5_coder_7b_to_1.5b": (250, 600),
    "qwen2.5_math_7b_to_1.5b": (150, 700),
    "qwen3_8b_to_0.6b": (200, 2500),
}
"""Mean lengths, tokens: assumed."""


@pytest.mark.parametrize("name", NAMES)
def test_each_is_the_papers_recipe(name: str) -> None:
    config = load_config(EXAMPLES / name / "run.toml")
    assert (config.training.kd_lambda, config.annotator.top_k, config.selection.tau) == (0.9, 10, 0.8)
    assert config.rounds.count * config.rounds.epochs_per_round == 10, "ten epochs, one refresh"
    assert (config.training.sequence_length, config.training.lr, config.training.min_lr) == (32768, 1e-5, 1e-6)


def test_the_script_beside_it_is_what_npd_slurm_renders() -> None:
    """If not: `npd slurm examples/LARGEST/run.toml --output examples/LARGEST/job.sh`."""
    assert (EXAMPLES / LARGEST / "job.sh").read_text(encoding="utf-8") == rendered(LARGEST)
    assert [path.parent.name for path in EXAMPLES.glob("*/job.sh")] == [LARGEST], "one is enough to read"


def test_those_on_one_node_differ_in_their_names_and_divisions_alone() -> None:
    """Trainer, annotators and sidecars have the GPUs one after another."""
    divisions = {name: DIVISIONS[name] for name in NAMES if name != LARGEST}
    scripts = set()
    for name, (training, annotators, sidecars) in divisions.items():
        assert training + annotators + sidecars == 8
        lines = rendered(name).replace(name, "NAME").splitlines()
        scripts.add("\n".join(line for line in lines if not line.startswith(("step ", "#   "))))
        first = 8 - sidecars
        gpus = f"{first}-7" if sidecars > 1 else "7"
        assert f"step rollout.node0 0 1 {sidecars} {gpus} rollout --policy all" in "\n".join(lines)
    assert len(scripts) == 1


def assumed_rates(name: str, config: Config, sampled: float) -> Rates:
    """What `examples/README.md` says of the divisions rests on this; nothing but the trainer's share was measured.

    Args:
        sampled: response tokens a second of a GPU that samples.
    """
    values = scaled_examples.read(name)["models"]
    teacher, student = (parameters_of(Path(values[role]).name) for role in ("teacher", "student"))
    prompt, response = PROMPT_AND_RESPONSE[name]
    training, annotator, engine = config.training, config.annotator, config.rollout.tensor_model_parallel_size
    return Rates(
        samples=SampleRates(
            prompt_tokens=prompt, response_tokens=response, kept_share=0.6, kept_tokens=prompt + response
        ),
        launch=LaunchRates(start_seconds=10),
        trainer=TrainerRates(
            start_seconds=60,
            tokens_per_second=training.tensor_model_parallel_size * 390e12 / (6 * student),
            step_seconds=0.2,
            publish_seconds=5,
        ),
        annotator=AnnotatorRates(
            start_seconds=60,
            tokens_per_second=annotator.tensor_model_parallel_size * 350e12 / (teacher + student),
        ),
        rollout=RolloutRates(start_seconds=90, tokens_per_second=engine * sampled),
        rollout_teacher=RolloutRates(start_seconds=90, tokens_per_second=engine * sampled / 6),
    )


def parameters_of(model: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(scaled_examples.RELEASED[model]))
        return stage_parameters(read_model_dims(Path(folder)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1, 2])
def test_the_gpus_go_to_those_who_need_them(name: str, factor: int) -> None:
    """Where a GPU samples 30,000 tokens a second, or twice that, of a small student, and a third of it of a 7B."""
    config = load_config(EXAMPLES / name / "run.toml")
    rates = assumed_rates(name, config, factor * (10_000 if name == LARGEST else 30_000))
    work, sizes = workload(config, make_plan(config, 20_000, 256), rates), Sizes.of(config)
    workers = Workers(config.training.data_parallel_size, config.slurm.annotators, config.slurm.sidecars)
    ours = simulate(work, rates, workers).seconds
    best = best_division(work, rates, sizes, sum(DIVISIONS[name]))
    assert best is not None and ours < 1.06 * best.timeline.seconds
    papers = Workers(4, 2, 4) if name == LARGEST else Workers(2, 1, 5)
    assert 0.40 < ours / simulate(work, rates, papers).seconds < 0.78


def rendered(name: str) -> str:
    """The script of an example, which leaves no device idle."""
    path = EXAMPLES / name / "run.toml"
    config = load_config(path)
    assert place_roles(config).idle_devices == 0
    return render(config, str(path.relative_to(EXAMPLES.parent)), [])


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_each_passes_the_check_before_its_weights_are_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled_examples.download_without_weights(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    path = str(EXAMPLES / name / "run.toml")
    assert main(["check", path, "--without-weights"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "ok: " in said
    assert "memory of one process of each role on a GPU" in said
    for role, terms in MEMORY.items():
        assert all(re.search(rf"^  {role} .*\n(    .*\n)*    {term} .*[0-9]", said, re.MULTILINE) for term in terms)
    assert "disk: at most" in said
    config = decide_dtype(load_config(path), in_cluster=True)
    dims = (read_model_dims(folder) for folder in (config.models.teacher, config.models.student))
    for memory in role_memories(config, *dims, "gpu"):
        assert memory.bytes < 70 * 2**30, f"{memory.role}: must fit on 80 GB beside CUDA and NCCL"
    assert main(["check", path]) == 2
    assert "no *.safetensors file in it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5_math_7b_to_1.5b", "qwen3_8b_to_0.6b"])
def test_a_scaled_down_run(name: str, tmp_path: Path) -> None:
    """openpangu_7b_to_1b runs in test_slurm."""
    inputs = scaled_examples.scaled_down(name, tmp_path)
    npd("run", inputs.path)
    check_finished(inputs.run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openpangu_72b_to_7b", "qwen2.5_coder_7b_to_1.5b"])
def test_a_scaled_down_trainer(name: str, tmp_path: Path) -> None:
    """Of these, another example of the same families exercises the engine."""
    inputs = scaled_examples.scaled_down(name, tmp_path)
    run = make_buffer(inputs)
    run_trainer(load_config(run.config), run)
    assert verify_version(run.version(max(published_versions(run))))
    assert run.student.is_dir()
