"""A teacher that has tokens of its own: never among the top-k, their probability is tail. transformers in float64."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_runs import run_ranks
from places import TESTS
from surplus_worker import annotated, random_pairs
from tiny_models import VOCAB_SIZE, make_llama
from transformers import AutoModelForCausalLM

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.teacher.annotator import _vocabularies

COMMON, OWN = 90, 121
"""Ids of the student's tokenizer and of the teacher's; the rest of the 128 rows is padding."""
WORKER = TESTS / "support" / "surplus_worker.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("surplus") / "teacher", 11)


@torch.no_grad()
def reference(folder: Path, temperature: float) -> dict[str, np.ndarray]:
    """The same figures from float64 softmaxes over the teacher's own tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    nll, ids, logprobs = [], [], []
    for prefix, response in random_pairs(COMMON):
        sequence = torch.from_numpy(np.concatenate([prefix, response]).astype(np.int64))
        logits_RV = model(sequence[None]).logits[0, len(prefix) - 1 : -1, :OWN]
        targets = torch.from_numpy(response.astype(np.int64))[:, None]
        nll.append(-logits_RV.log_softmax(-1).gather(1, targets).mean().item())
        best = (logits_RV / temperature).log_softmax(-1)[:, :COMMON].topk(5, -1)
        ids.append(best.indices.numpy())
        logprobs.append(best.values.numpy())
    kept = np.concatenate(logprobs)
    tail = 1 - np.exp(kept).sum(-1)
    return {"nll": np.array(nll), "ids": np.concatenate(ids), "logprobs": kept, "tail_mass": tail}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(found["ids"], expected["ids"])
    for name in ("nll", "logprobs", "tail_mass"):
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_surplus_is_tail_and_logprobs_are_of_the_whole_softmax(
    teacher: Path, parallel: Parallel, temperature: float
) -> None:
    expected = reference(teacher, temperature)
    found = annotated(teacher, parallel, COMMON, OWN, temperature)
    assert_same(found, expected)
    assert found["ids"].max() < COMMON
    without = annotated(teacher, parallel, COMMON, COMMON, temperature)
    assert np.mean(expected["tail_mass"] - without["tail_mass"]) > 0.02, (
        "the surplus has mass here, or nothing is tested"
    )
    padded = annotated(teacher, parallel, COMMON, VOCAB_SIZE, temperature)
    assert np.mean(padded["tail_mass"] - expected["tail_mass"]) > 0.002, "and so have the padding rows"


@pytest.mark.slow
def test_two_tensor_parallel_ranks_give_the_same(teacher: Path, tmp_path: Path) -> None:
    """The boundary between the ranks, row 64, lies within the common ids; the second has all three kinds."""
    job = {"teacher": str(teacher), "out": str(tmp_path / "rank"), "arguments": [COMMON, OWN, 1.7]}
    run_ranks([sys.executable, str(WORKER), json.dumps(job)], 2, tmp_path / "rendezvous")
    for rank in range(2):
        assert_same(dict(np.load(tmp_path / f"rank_{rank}.npz")), reference(teacher, 1.7))


@pytest.mark.slow
def test_a_rank_may_have_surplus_and_padding_alone(teacher: Path, parallel: Parallel, tmp_path: Path) -> None:
    """No id below 50 lies on the second of two ranks: it has no candidate, only mass."""
    job = {"teacher": str(teacher), "out": str(tmp_path / "rank"), "arguments": [50, OWN, 1.0]}
    run_ranks([sys.executable, str(WORKER), json.dumps(job)], 2, tmp_path / "rendezvous")
    assert_same(dict(np.load(tmp_path / "rank_0.npz")), annotated(teacher, parallel, 50, OWN, 1.0))


@pytest.mark.parametrize(
    ("rows", "of_teacher", "of_student", "expected"),
    [
        (128, 99, 99, (128, 128, 128)),
        (128, 131, 99, (99, 131, 128)),  # rows the student has at the surplus's ids are no tokens of it
        (128, 131, 128, (128, 131, 128)),
    ],
)
def test_what_counts_are_the_students_tokens(
    rows: int, of_teacher: int, of_student: int, expected: tuple[int, int, int]
) -> None:
    assert _vocabularies(rows, of_teacher, of_student) == expected
