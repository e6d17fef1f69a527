"""A whole run with a teacher that has tokens of its own: they are left out, and what is left is trained on."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from inputs import Inputs, write_prompts
from npd_runs import npd
from tiny_models import make_llama
from tiny_tokenizer import make_tokenizer

from megatron_npd.buffer.shards import Shard, read_shard
from megatron_npd.files import read_json
from megatron_npd.run_directory import WARMUP_STAGE, RunDirectory, round_stage
from megatron_npd.schema import Verdict

pytestmark = pytest.mark.slow
STUDENTS, TEACHERS = 99, 139
"""Ids of their tokenizers. The student has no row more, the teacher has."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    root = tmp_path_factory.mktemp("surplus_run")
    make_llama(root / "teacher", 0, vocab_size=144, num_hidden_layers=1)
    make_tokenizer(root / "teacher", more=tuple(f"m{number}" for number in range(TEACHERS - STUDENTS)))
    make_llama(root / "student", 1, vocab_size=STUDENTS, num_hidden_layers=1)
    make_tokenizer(root / "student")
    shutil.copy(root / "student" / "chat_template.jinja", root / "teacher")
    inputs = Inputs(root)
    write_prompts(inputs.train, {f"t{i}": f"What is {i} plus {i}?" for i in range(24)})
    write_prompts(inputs.heldout, {f"h{i}": f"Name {i} things." for i in range(24)})
    inputs.set(WARMUP_STAGE, {"samples_per_prompt": 1, "lr": 1e-3})
    inputs.set("rounds", {"count": 1, "epochs_per_round": 1})
    # A random teacher's tokens are its own one time in four.
    inputs.set("rollout", {"max_new_tokens": 4, "samples_per_unit": 12, "kv_cache_gib": 0.05, "threads": 1})
    inputs.set("selection", {"reject_truncated": False})
    inputs.set("annotator.threads", 1)
    npd("run", inputs.path)
    return RunDirectory(inputs.run)


def shards(run: RunDirectory, stage: str) -> list[Shard]:
    return [read_shard(run.unit("samples", stage, unit), "samples") for unit in range(2)]


def test_responses_with_the_teachers_own_tokens_are_left_out(finished: RunDirectory) -> None:
    verdicts = []
    for shard in shards(finished, WARMUP_STAGE):
        for row in range(len(shard)):
            outside = shard.response(row).max() >= STUDENTS
            assert outside == (shard["verdict"][row] == Verdict.OUT_OF_VOCABULARY)
        verdicts += shard["verdict"].tolist()
    assert verdicts.count(Verdict.OUT_OF_VOCABULARY) > 3 and verdicts.count(Verdict.KEPT) > 3


def test_annotations_are_of_the_students_tokens_and_the_rest_is_tail(finished: RunDirectory) -> None:
    for stage in (WARMUP_STAGE, round_stage(0)):
        for shard in shards(finished, stage):
            assert (shard["topk_ids"] < STUDENTS).all()
            inside = np.exp(shard["topk_logprobs"]).sum(-1)
            np.testing.assert_allclose(inside + shard["tail_mass"], 1, atol=1e-5)
    own = shards(finished, round_stage(0))
    assert all(shard["response_ids"].max() < STUDENTS for shard in own)
    assert sum(len(shard["topk_ids"]) for shard in own) > 0


def test_the_run_ends_with_a_student_and_its_figures(finished: RunDirectory) -> None:
    summary = read_json(finished.root / "summary.json")
    assert summary["rollouts_kept"] > 0 and np.isfinite(summary["heldout_kl_after"])
    assert (finished.student / "config.json").is_file()
