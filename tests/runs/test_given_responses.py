"""Whole runs on responses that the user has: supervised fine-tuning, offline distillation, and half and half."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from inputs import Inputs
from npd_runs import npd
from pyarrow.parquet import write_table
from tiny_tokenizer import THINKING, make_tokenizer

from megatron_npd.buffer.shards import Shard, read_shard
from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.files import read_json
from megatron_npd.process.metrics import read_metrics
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import GIVEN_VERSION, TEACHER_VERSION, Verdict
from megatron_npd.versions.manifest import published_versions

pytestmark = pytest.mark.slow

QUESTIONS = 24
END = 2


def thinks(number: int) -> bool:
    return number % 3 == 0


def rows() -> list[dict[str, Any]]:
    """Questions with answers; every third is to be thought about, by a setting of its own."""
    return [
        {
            "id": f"t{i}",
            "question": f"What is {i} plus {i}?",
            "answer": f"It is {2 * i}.",
            "chat_template_kwargs": {"enable_thinking": thinks(i)},
        }
        for i in range(QUESTIONS)
    ]


def make_inputs(checkpoints: Path, root: Path) -> Inputs:
    shutil.copytree(checkpoints, root, dirs_exist_ok=True)
    for name in ("teacher", "student"):
        make_tokenizer(root / name, template=THINKING)
    inputs = Inputs(root)
    write_table(pyarrow.Table.from_pylist(rows()), root / "train.parquet")
    inputs.set("prompts.train", str(root / "train.parquet"))
    inputs.set("prompts.columns", {"prompt": "question", "response": "answer"})
    inputs.set("rollout", {"max_new_tokens": 40, "samples_per_unit": 10, "kv_cache_gib": 0.05, "threads": 1})
    inputs.set("selection", {"reject_truncated": False, "tau": 1e9})  # random models rarely end by themselves
    inputs.set("annotator.threads", 1)
    inputs.set("training.lr", 3e-3)
    inputs.set("training.global_batch_size", 2)
    # The held-out file has no such columns; its prompts are chats, and not thought about.
    inputs.heldout.write_text(
        "".join(json.dumps({"id": f"h{i}", "question": f"Name {i} things."}) + "\n" for i in range(3))
    )
    inputs.set("prompts.chat_template_kwargs", {"enable_thinking": False})
    return inputs


def shards(run: RunDirectory, kind: str, stage: str) -> list[Shard]:
    return [read_shard(path, kind) for path in sorted(run.stage(kind, stage).glob("unit_*.safetensors"))]


@pytest.fixture(scope="module")
def tokenizer(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(
        make_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=THINKING), trust_remote_code=False
    )


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["fine-tuning", "offline distillation"])
def on_data(request: pytest.FixtureRequest, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A run without rounds on given responses."""
    inputs = make_inputs(checkpoints, tmp_path_factory.mktemp("on_data"))
    inputs.set("rounds", {"count": 0})
    inputs.set("warmup", {"source": "data", "epochs": 3, "lr": 1e-2, "kd_lambda": request.param})
    npd("run", inputs.path)
    return inputs


def test_a_run_without_rounds_ends_with_a_student_a_report_and_a_heldout_kl(on_data: Inputs) -> None:
    run = RunDirectory(on_data.run)
    assert published_versions(run) == [0, 1]
    assert (run.student / "model.safetensors.index.json").is_file() or list(run.student.glob("*.safetensors"))
    summary = read_json(run.summary)
    before, after = summary["heldout_kl_before"], summary["heldout_kl_after"]
    assert before is not None and after is not None and after == summary["heldout_kl_after_warmup"]
    assert summary["warmup_responses"] == QUESTIONS == summary["warmup_kept"]
    assert summary["rollouts_generated"] is None and summary["optimizer_steps"] > 0
    assert summary["trained_on"] == {"warmup": {"samples": QUESTIONS, "given": QUESTIONS}}
    assert run.report.stat().st_size > 10_000
    assert not run.metrics("rollout").exists(), "the student's sidecar is never started"
    assert "finished" in npd("status", on_data.run)


def test_the_loss_is_the_one_that_was_asked_for(on_data: Inputs) -> None:
    steps = [r for r in read_metrics(on_data.run / "metrics") if (r["role"], r["event"]) == ("trainer", "step")]
    share = read_json(on_data.run / "summary.json")["settings"]["warmup_kd_lambda"]
    assert len(steps) >= 3
    for step in steps:
        expected = (1 - share) * step["train/ce"] + share * step["train/kd"]
        assert step["train/loss"] == pytest.approx(expected, rel=1e-5)
        assert step["near_policy/kl"] is None and np.isfinite(step["train/kd"])
    assert steps[-1]["train/ce"] < steps[0]["train/ce"]


def test_given_responses_are_annotated_like_any_other_sample(on_data: Inputs, tokenizer: Tokenizer) -> None:
    run = RunDirectory(on_data.run)
    prompts = load_prompt_set(run.prompts("train"))
    annotated = shards(run, "samples", "warmup")
    assert sum(map(len, annotated)) == QUESTIONS
    for shard in annotated:
        assert set(shard["policy_version"]) == {GIVEN_VERSION} and np.isnan(shard["behaviour_logprobs"]).all()
        assert (shard["verdict"] == Verdict.KEPT).all() and len(shard["topk_ids"]) == len(shard["response_ids"])
        assert np.isfinite(shard["nll_teacher_conditional"]).all()
        for row, index in enumerate(shard["prompt_index"]):
            said = tokenizer.decode(shard.response(row).tolist())
            assert said == ("(think)(end)\n" if thinks(index) else "") + f"It is {2 * index}.</s>"
            assert np.array_equal(shard.response(row), prompts.response(index)) and shard.response(row)[-1] == END


def test_both_framings_reach_the_shards(on_data: Inputs, tokenizer: Tokenizer) -> None:
    run, silent = RunDirectory(on_data.run), "<s>assistant\n(think)(end)\n"
    for shard in shards(run, "samples", "warmup"):
        for row, index in enumerate(shard["prompt_index"]):
            assert tokenizer.decode(shard.prompt(row).tolist()).endswith(silent) != thinks(index)
        counts = {f["chat_template_kwargs"]["enable_thinking"]: f["prompts"] for f in shard.metadata["framings"]}
        on = sum(map(thinks, shard["prompt_index"].tolist()))
        assert counts == {True: on, False: len(shard) - on}
    (heldout,) = shards(run, "rollouts", "heldout")
    assert [f["chat_template_kwargs"] for f in heldout.metadata["framings"]] == [{"enable_thinking": False}]
    assert all(tokenizer.decode(heldout.prompt(row).tolist()).endswith(silent) for row in range(3))
    assert set(heldout["policy_version"]) == {TEACHER_VERSION}


def test_npd_prompts_shows_both_framings(on_data: Inputs) -> None:
    text = npd("prompts", on_data.path, "--show", "1")
    assert '"enable_thinking": true}' in text and '"enable_thinking": false}' in text
    assert text.count("⟦<s> 1⟧") > 4 and "given response" in text


def test_half_given_half_own_is_trained_on_in_that_ratio(checkpoints: Path, tmp_path: Path) -> None:
    inputs = make_inputs(checkpoints, tmp_path)
    inputs.set("rounds", {"count": 1, "epochs_per_round": 2, "given_share": 0.5})
    inputs.set("selection", {"reject_truncated": False})  # which rejects some: the share must hold all the same
    npd("run", inputs.path)
    run = RunDirectory(inputs.run)
    annotated = shards(run, "samples", "round_0000")
    versions = np.concatenate([shard["policy_version"] for shard in annotated])
    kept = np.concatenate([shard["verdict"] == Verdict.KEPT for shard in annotated])
    own, given = int(np.sum(kept & (versions == 0))), int(np.sum(kept & (versions == GIVEN_VERSION)))
    assert 0 < own < QUESTIONS == given, "some of the student's own are rejected, no given one is"
    summary = read_json(run.summary)
    assert summary["trained_on"] == {"round_0000": {"samples": 2 * own, "given": own}}
    assert (summary["rollouts_generated"], summary["rollouts_kept"]) == (QUESTIONS, own), "the student's own"
    steps = [r for r in read_metrics(run.metrics_folder) if (r["role"], r["event"]) == ("trainer", "step")]
    drifts = [step["near_policy/kl"] for step in steps if step["near_policy/kl"] is not None]
    assert drifts and all(np.isfinite(drift) and drift >= 0 for drift in drifts)
    pairs = (zip(shard["prompt_index"], shard["sample_index"], strict=True) for shard in annotated)
    identities = {pair for of_shard in pairs for pair in of_shard}
    assert len(identities) == 2 * QUESTIONS, "no sample is another's"
    assert "given" in npd("inspect", inputs.run, "--kept")
