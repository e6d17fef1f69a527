"""The Megatron trainer against `independent_step.py`: same weights, same batch, three AdamW steps, every family.

One process in float32 against float64; the layouts are compared with one process in test_megatron.py.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from independent_step import Recipe, train
from megatron_runs import Outcome, train_all
from places import SUPPORT
from safetensors.torch import load_file
from tiny_models import FAMILIES, VOCAB_SIZE, for_transformers, make_model

CASES = {f"{family}_{'tied' if tied else 'untied'}": (family, tied) for family in FAMILIES for tied in (True, False)}
STEPS = 3
RECIPE = Recipe(
    lr=1e-3,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.95,
    # Adam's first steps are ±lr whatever the gradient's size, so float32 rounding decides where a gradient is almost
    # zero. This eps is below all but 1 % of the clipped gradients (median 6e-4) and far above the rounding of the
    # rest: the update is a smooth function of the gradient, and every tensor can be compared closely. With 1e-8 the
    # same comparison errs 70 times more.
    adam_eps=1e-5,
    clip_grad=0.5,
    kd_lambda=0.9,
)
# Each within 3 times of the largest difference measured over the six cases: 4.5e-8, 1.5e-7, 2.5e-7, 3.5e-5.
LOSS, NORM, WEIGHTS, UPDATE = 1e-7, 4e-7, 7e-7, 1e-4


def test_the_reference_shares_no_code_with_the_trainer() -> None:
    imported = set()
    for node in ast.walk(ast.parse((SUPPORT / "independent_step.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "torch", "transformers"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two key-value heads, each with two query heads."""
    root = tmp_path_factory.mktemp("models")
    return {
        case: make_model(family, root / case, 3, tied=tied, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        for case, (family, tied) in CASES.items()
    }


@pytest.fixture(scope="module")
def outcomes(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What the Megatron trainer makes of each checkpoint."""
    overrides = {key: value for key, value in asdict(RECIPE).items() if key != "lr"}
    common = {"steps": STEPS, "lr": RECIPE.lr, "training": overrides | {"tail": "bucket"}}
    jobs = {case: common | {"checkpoint": str(folder)} for case, folder in checkpoints.items()}
    any_checkpoint = next(iter(checkpoints.values()))  # each job names its own
    return train_all(jobs, any_checkpoint, tmp_path_factory.mktemp("megatron"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_independent_ones(
    case: str, checkpoints: dict[str, Path], outcomes: dict[str, Outcome]
) -> None:
    from megatron_worker import make_samples  # it imports Megatron: not for the fast test above

    original = load_file(checkpoints[case] / "model.safetensors")
    steps, weights = train(for_transformers(checkpoints[case]), make_samples(VOCAB_SIZE), RECIPE, STEPS)
    outcome = outcomes[case]
    for ours, reference in zip(outcome.history, steps, strict=True):
        assert ours["loss"] == pytest.approx(reference.loss, rel=LOSS)
        assert ours["norm"] == pytest.approx(reference.norm, rel=NORM)
        assert reference.norm > 1.5 * RECIPE.clip_grad, "clipping does next to nothing here"
    assert set(outcome.trained) == set(weights) == set(original)
    for name, reference in weights.items():
        error = (outcome.trained[name].double() - reference).norm()
        assert error <= WEIGHTS * reference.norm(), name
        assert error <= UPDATE * (reference - original[name].double()).norm(), name
