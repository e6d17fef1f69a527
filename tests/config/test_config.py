"""The configuration: defaults, overrides, every rule across sections, and what identifies a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_npd.config import Config, load_config
from megatron_npd.errors import UserError

MINIMAL = """
run_directory = "runs/a"
[models]
teacher = "t"
student = "s"
[prompts]
train = "train.jsonl"
heldout = "heldout.jsonl"
max_prompt_tokens = 512
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def refused(path: Path, *overrides: str) -> str:
    """The line a configuration is refused with."""
    with pytest.raises(UserError) as refusal:
        load_config(path, list(overrides))
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_papers_recipe(path: Path) -> None:
    config = load_config(path)
    assert (config.rounds.count, config.rounds.epochs_per_round) == (2, 5)
    assert (config.selection.tau, config.training.kd_lambda, config.annotator.top_k) == (0.8, 0.9, 10)
    assert config.training.world_size == 1


def test_overrides_are_toml_values_and_bare_words(path: Path) -> None:
    config = load_config(
        path,
        [
            "training.lr=2e-5",
            "models.dtype=float32",
            "training.distributed_optimizer=true",
            "seed=7",
            'models.student="x y"',
        ],
    )
    assert config.training.lr == 2e-5
    assert config.models.dtype == "float32"
    assert config.training.distributed_optimizer is True
    assert config.seed == 7
    assert config.models.student == "x y"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lrr=1", ["unknown key training.lrr", "did you mean training.lr?"]),
        ("trainng.lr=1", ["unknown key trainng", "training"]),
        ("rounds.publish_at=0.0", ["rounds.publish_at = 0.0", "greater than 0"]),
        ("rounds.publish_at=1.5", ["rounds.publish_at = 1.5", "less than or equal to 1"]),
        ("rounds.count=two", ["rounds.count = 'two'", "integer"]),
        ("rounds.count=1.0", ["rounds.count = 1.0", "integer"]),
        ("training.kd_lambda=true", ["training.kd_lambda = True", "number"]),
        ("models.dtype=float16", ["models.dtype = 'float16'", "bfloat16"]),
        ("training.tail=all", ["training.tail = 'all'", "bucket"]),
        ("training.sequence_parallel=true", ["training.sequence_parallel = true", "tensor_model_parallel_size > 1"]),
        ("training.data_parallel_size=3", ["training.global_batch_size = 8", "multiple", "data_parallel_size = 3"]),
        ("training.min_lr=0.5", ["training.min_lr = 0.5", "must not exceed training.lr"]),
        ("training.sequence_length=1000", ["training.sequence_length = 1000", "1536"]),
        ("annotator.pack_length=1000", ["annotator.pack_length = 1000", "1536"]),
        ("rollout.temperature=3.0", ["rollout.temperature = 3.0", "less than or equal to 2"]),
        ("rollout.temperature=0.001", ["rollout.temperature = 0.001", "greater than or equal to 0.01"]),
        ("rollout.max_num_seqs=8193", ["rollout.max_num_seqs = 8193", "less than or equal to 8192"]),
        ("rollout.threads=100000", ["rollout.threads = 100000", "less than or equal to 4096"]),
        ("seed=99999999999999999999", ["seed = 99999999999999999999", "less than or equal to"]),
        ("nothing", ["--set nothing", "section.key=value"]),
        ("seed.x=1", ["seed = {'x': 1}", "integer"]),
        ("run_directory.x=1", ["--set run_directory.x=1", "not a section"]),
    ],
)
def test_every_fault_names_key_value_and_rule(path: Path, override: str, words: list[str]) -> None:
    message = refused(path, override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 0.9),
        (["training.kd_lambda=0.5"], 0.5),
        (["training.kd_lambda=0"], 0.0),
        (["training.kd_lambda=1"], 1.0),
        (["training.kd_lambda=1", "warmup.kd_lambda=0"], 0.0),
    ],
)
def test_the_warm_ups_loss_is_that_of_the_rounds_unless_it_is_set(
    path: Path, overrides: list[str], expected: float
) -> None:
    """Also where TOML has a whole number."""
    config = load_config(path, overrides)
    assert config.warmup.kd_lambda == expected
    path.write_text(config.to_toml())
    again = load_config(path, ["training.kd_lambda=0.3"])
    assert again.warmup.kd_lambda == expected, "a run's own file has the number"


def float_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key whose value is a fractional number."""
    keys = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += float_keys(field.annotation, f"{prefix}{name}.")
        elif field.annotation is float:
            keys.append(prefix + name)
    return keys


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize("key", float_keys())
def test_infinity_and_nan_are_no_values(path: Path, key: str, value: str) -> None:
    message = refused(path, f"{key}={value}")
    assert f"{key} = {value}: input should be" in message, message


def test_rules_over_two_overrides(path: Path) -> None:
    assert "rounds.max_policy_lag = 0" in refused(path, "rounds.max_policy_lag=0", "rounds.publish_at=0.5")
    split = (
        "training.sequence_parallel=true",
        "training.tensor_model_parallel_size=3",
        "training.sequence_length=32767",
    )
    assert "training.sequence_length = 32767: must be a multiple of" in refused(path, *split)


def test_missing_key_and_unreadable_files(tmp_path: Path, path: Path) -> None:
    path.write_text('run_directory = "x"\n')
    assert "missing key models (and 1 more)" in refused(path)
    assert "No such file" in refused(tmp_path / "none.toml")
    path.write_text("a = = 1")
    assert "not valid TOML" in refused(path)
    path.write_bytes(b"\xff\xfe")
    assert "not valid TOML" in refused(path)


def test_round_trip_through_toml(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["training.lr=3.3e-5", 'prompts.train=with "quotes" and ümlaut'])
    written = tmp_path / "config.toml"
    written.write_text(config.to_toml())
    again = load_config(written)
    assert again == config
    assert again.digest == config.digest


def test_digest_leaves_out_the_place_and_how_it_is_launched(path: Path) -> None:
    digest = load_config(path).digest
    assert (
        load_config(path, ["run_directory=elsewhere", "launch.turns=off", "launch.lease_seconds=1.0"]).digest == digest
    )
    for override in ("seed=1", "training.lr=2e-5", "rounds.count=3", "models.student=other"):
        assert load_config(path, [override]).digest != digest


def test_digest_leaves_out_how_the_trainer_is_laid_out(path: Path) -> None:
    digest = load_config(path).digest
    layouts = (
        "tensor_model_parallel_size=2",
        "data_parallel_size=2",
        "distributed_optimizer=true",
        "recompute=full",
        "checkpoint_interval=7",
        "threads=3",
    )
    assert load_config(path, [f"training.{key}" for key in layouts]).digest == digest
    # Context parallelism pads every sample, so other samples share a pack.
    assert load_config(path, ["training.context_parallel_size=2"]).digest != digest


def test_layouts_that_cannot_be_are_refused(path: Path) -> None:
    faults = {
        "training.virtual_pipeline_model_parallel_size=2": "needs training.pipeline_model_parallel_size > 1",
        "training.sequence_parallel=true": "needs training.tensor_model_parallel_size > 1",
        "training.context_parallel_size=3": "must be a multiple of 6",
        "training.kd_temperature=0": "greater than 0",
    }
    for override, rule in faults.items():
        with pytest.raises(UserError, match=rule):
            load_config(path, [override])


def test_a_configuration_does_not_change(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert isinstance(config, Config)
