"""Packed prefill through real Megatron against transformers, and the annotation of a shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import EOS, FAMILIES, LLAMA3_ROPE, VOCAB_SIZE, for_transformers, make_llama, make_model
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_npd.buffer.shards import Shard, concatenate_ragged, read_shard, write_shard
from megatron_npd.config import Config, load_config
from megatron_npd.data.tokenizer import load_tokenizer
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import UserError
from megatron_npd.mcore.model import ModelOptions
from megatron_npd.schema import FinishReason, Verdict
from megatron_npd.selection.rules import rule_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_llama(root / name, seed) for seed, name in enumerate(("teacher", "student"))}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path], parallel: Parallel) -> dict:
    from megatron_npd.teacher.prefill import PrefillModel

    return {
        n: PrefillModel(f, parallel, torch.float32, ModelOptions("reference"), VOCAB_SIZE) for n, f in folders.items()
    }


def pairs_of(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)

    def tokens(low: int, high: int) -> np.ndarray:
        return generator.integers(3, VOCAB_SIZE, generator.integers(low, high)).astype(np.int32)

    return [(tokens(1, 20), np.append(tokens(0, 30), EOS).astype(np.int32)) for _ in range(count)]


def hf_logprobs(folder: Path, prefix: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """float32 [R, V] of Hugging Face, one sequence at a time, unpacked."""
    model = AutoModelForCausalLM.from_pretrained(for_transformers(folder), dtype=torch.float32)
    ids = torch.from_numpy(np.concatenate([prefix, response]).astype(np.int64))
    with torch.no_grad():
        return model(ids[None]).logits[0, len(prefix) - 1 : -1].log_softmax(-1)


def test_packed_nll_and_topk_equal_hugging_face(models: dict, folders: dict[str, Path]) -> None:
    pairs = pairs_of(9)
    nll, annotations = models["teacher"].annotate(pairs, 64, 5)
    assert np.array_equal(nll, models["teacher"].mean_nll(pairs, 200)), "scores depend on how they were packed"
    for (prefix, response), score, annotation in zip(pairs, nll, annotations, strict=True):
        logprobs = hf_logprobs(folders["teacher"], prefix, response)
        targets = torch.from_numpy(response.astype(np.int64))
        assert score == pytest.approx(-logprobs.gather(1, targets[:, None]).mean().item(), abs=1e-5)
        top = logprobs.topk(5, -1)
        np.testing.assert_array_equal(annotation.ids, top.indices.numpy())
        np.testing.assert_allclose(annotation.logprobs, top.values.numpy(), atol=2e-5)
        np.testing.assert_allclose(annotation.tail_mass, 1 - top.values.exp().sum(-1).numpy(), atol=2e-5)


LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
VARIANTS: dict[str, tuple[str, dict]] = {
    **{f"{family} tied": (family, {"tied": True}) for family in FAMILIES},
    **{f"{family} untied": (family, {"tied": False}) for family in FAMILIES},
    "llama with attention_bias": ("llama", {"attention_bias": True}),
    "llama with llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen3 with linear rope": ("qwen3", {"rope_parameters": LINEAR_ROPE}),
}


@pytest.mark.parametrize(("family", "options"), VARIANTS.values(), ids=VARIANTS)
def test_every_familys_distribution_equals_hugging_face(
    family: str, options: dict, parallel: Parallel, tmp_path: Path
) -> None:
    """Over the whole vocabulary: the teacher's top-k with k = V. Two key-value heads, each with two query heads."""
    from megatron_npd.teacher.prefill import PrefillModel

    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}} | options
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    folder = make_model(family, tmp_path / "model", 5, **heads | rope)
    pairs = pairs_of(6)
    model = PrefillModel(folder, parallel, torch.float32, ModelOptions("reference"), VOCAB_SIZE)
    _, annotations = model.annotate(pairs, 100, VOCAB_SIZE)
    for (prefix, response), annotation in zip(pairs, annotations, strict=True):
        logprobs_RV = torch.empty(len(response), VOCAB_SIZE)
        logprobs_RV.scatter_(1, torch.from_numpy(annotation.ids).long(), torch.from_numpy(annotation.logprobs))
        reference_RV = hf_logprobs(folder, prefix, response)
        torch.testing.assert_close(logprobs_RV, reference_RV, rtol=0, atol=5e-6)  # measured: 2e-6


def make_config(folders: dict[str, Path], tmp_path: Path) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(
        f'run_directory = "{tmp_path}/run"\n'
        f'[models]\nteacher = "{folders["teacher"]}"\nstudent = "{folders["student"]}"\n'
        '[prompts]\ntrain = "t"\nheldout = "h"\nmax_prompt_tokens = 32\n[rollout]\nmax_new_tokens = 32\n'
        "[annotator]\ntop_k = 4\npack_length = 64\n[training]\nsequence_length = 64\n"
    )
    return load_config(path)


def make_rollouts(pairs: list[tuple[np.ndarray, np.ndarray]], reasons: list[FinishReason], sampled_by: Path) -> Shard:
    """A shard whose behaviour logprobs are those of the checkpoint in `sampled_by`, by Hugging Face."""
    prompt_ids, prompt_offsets = concatenate_ragged([p for p, _ in pairs], "int32")
    response_ids, response_offsets = concatenate_ragged([r for _, r in pairs], "int32")
    count = len(pairs)
    return Shard(
        "rollouts",
        {
            "prompt_index": np.arange(count),
            "sample_index": np.zeros(count, np.int32),
            "seed": np.arange(count),
            "policy_version": np.zeros(count, np.int32),
            "finish_reason": np.array(reasons, np.uint8),
            "prompt_ids": prompt_ids,
            "prompt_offsets": prompt_offsets,
            "response_ids": response_ids,
            "response_offsets": response_offsets,
            "behaviour_logprobs": np.concatenate([behaviour_logprobs(sampled_by, *pair) for pair in pairs]),
        },
        {"stage": "round_0000"},
    )


def behaviour_logprobs(folder: Path, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """float32 [R]; zeros for a response with an id that the model does not have."""
    if response.max() >= VOCAB_SIZE:
        return np.zeros(len(response), np.float32)
    targets = torch.from_numpy(response.astype(np.int64))
    return hf_logprobs(folder, prompt, response).gather(1, targets[:, None])[:, 0].numpy()


def test_annotation_judges_and_annotates_what_is_kept(models: dict, folders: dict[str, Path], tmp_path: Path) -> None:
    from megatron_npd.teacher.annotation import annotate_shard

    config, prefix = make_config(folders, tmp_path), np.array([1], np.int32)
    pairs = pairs_of(12)
    pairs[0] = (pairs[0][0], np.array([EOS], np.int32))  # empty
    pairs[1] = (pairs[1][0], np.array([5, VOCAB_SIZE + 7, EOS], np.int32))  # no such token
    reasons = [FinishReason.STOP] * 12
    reasons[2] = FinishReason.LENGTH
    shard = make_rollouts(pairs, reasons, folders["student"])
    samples, tokens = annotate_shard(
        shard, config, rule_of(config.selection), models["teacher"], models["student"], prefix, frozenset({EOS}),
        VOCAB_SIZE,
    )  # fmt: skip
    write_shard(tmp_path / "samples.safetensors", samples)
    samples = read_shard(tmp_path / "samples.safetensors", "samples")
    assert samples["verdict"][:3].tolist() == [Verdict.EMPTY, Verdict.OUT_OF_VOCABULARY, Verdict.TRUNCATED]
    lengths = np.array([len(response) for _, response in pairs])
    scored = (np.arange(12) >= 3) & (lengths > 1)
    for name in ("nll_teacher_conditional", "nll_student_conditional", "delta_ifd"):
        np.testing.assert_array_equal(np.isfinite(samples[name]), scored, "rejected whatever the score: not scored")
    kept = samples["verdict"] == Verdict.KEPT
    delta = samples["delta_ifd"][scored]
    np.testing.assert_array_equal(kept[scored], (delta >= 0) & (delta <= config.selection.tau))
    np.testing.assert_array_equal(np.diff(samples["topk_offsets"]), np.where(kept, lengths, 0))
    # Numerator and denominator: the same tokens, given the prompt and given the prefix alone.
    for row in (4, 7):
        response = pairs[row][1]
        for name in ("teacher", "student"):
            for form, before in (("conditional", pairs[row][0]), ("unconditional", prefix)):
                logprobs = hf_logprobs(folders[name], before, response)
                nll = -logprobs.gather(1, torch.from_numpy(response.astype(np.int64))[:, None]).mean().item()
                assert samples[f"nll_{name}_{form}"][row] == pytest.approx(nll, abs=1e-5)
    read = [pair for pair, is_scored in zip(pairs, scored, strict=True) if is_scored]
    once, twice = (sum(len(p) + len(r) - 1 for p, r in read), sum(len(prefix) + len(r) - 1 for _, r in read))
    assert tokens == once + 2 * twice, "the student given the prompt is not prefilled: the sidecar's logprobs say it"


def test_without_a_filter_nothing_is_prefilled_but_what_the_loss_needs(
    models: dict, folders: dict[str, Path], tmp_path: Path
) -> None:
    from megatron_npd.teacher.annotation import annotate_shard

    config, prefix, pairs = make_config(folders, tmp_path), np.array([1], np.int32), pairs_of(6)
    shard = make_rollouts(pairs, [FinishReason.STOP] * 6, folders["student"])
    plain = config.selection.model_copy(update={"rule": "none"})
    annotated = {
        name: annotate_shard(
            shard, config, rule_of(rule), models["teacher"], models["student"], prefix, frozenset({EOS}), VOCAB_SIZE
        )
        for name, rule in {"filtered": config.selection, "plain": plain}.items()
    }
    samples, tokens = annotated["plain"]
    usable = np.array([len(response) > 1 for _, response in pairs])
    np.testing.assert_array_equal(samples["verdict"] == Verdict.KEPT, usable)
    assert tokens == sum(len(p) + len(r) - 1 for (p, r), is_scored in zip(pairs, usable, strict=True) if is_scored)
    for name in ("nll_teacher_unconditional", "nll_student_unconditional", "delta_ifd"):
        assert np.isnan(samples[name]).all()
    for name in ("nll_teacher_conditional", "nll_student_conditional"):
        np.testing.assert_array_equal(samples[name], annotated["filtered"][0][name])


def test_teacher_equal_to_student_gives_zero_delta(models: dict, folders: dict[str, Path], tmp_path: Path) -> None:
    from megatron_npd.teacher.annotation import annotate_shard
    from megatron_npd.teacher.heldout import HeldoutSet

    teacher, pairs = models["teacher"], pairs_of(6)
    shard = make_rollouts(pairs, [FinishReason.STOP] * 6, folders["teacher"])
    config = make_config(folders, tmp_path)
    samples, _ = annotate_shard(
        shard,
        config,
        rule_of(config.selection),
        teacher,
        teacher,
        np.array([1], np.int32),
        frozenset({EOS}),
        VOCAB_SIZE,
    )
    scored = samples["verdict"] != Verdict.EMPTY
    np.testing.assert_allclose(samples["delta_ifd"][scored], 0, atol=1e-5)
    figures = HeldoutSet(teacher, pairs, 64, 0).evaluate(teacher)
    assert figures.heldout_kl == pytest.approx(0, abs=1e-6) and figures.top1_agreement == 1.0


def test_heldout_kl_is_the_full_forward_kl(models: dict, folders: dict[str, Path]) -> None:
    from megatron_npd.teacher.heldout import HeldoutSet

    pairs = pairs_of(5)
    figures = HeldoutSet(models["teacher"], pairs, 64, 0).evaluate(models["student"])
    kls = []
    for prefix, response in pairs:
        log_p, log_q = (hf_logprobs(folders[name], prefix, response).double() for name in ("teacher", "student"))
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
    assert figures.heldout_kl == pytest.approx(torch.cat(kls).mean().item(), abs=1e-5)
    assert figures.tokens == sum(len(response) for _, response in pairs)


@pytest.mark.parametrize(("room", "kept"), [(1e9, "all"), (6000.0, "some"), (0, "none")])
def test_teacher_reads_the_heldout_set_once(
    models: dict, monkeypatch: pytest.MonkeyPatch, room: float, kept: str
) -> None:
    """What is kept of its pass gives the very figures of a pass made anew; what has no room is read again."""
    from megatron_npd.teacher.heldout import HeldoutSet

    teacher, student, pairs = models["teacher"], models["student"], pairs_of(9)
    passes, hidden = [], type(teacher).hidden

    def count(model: object, group: list) -> torch.Tensor:
        passes.append(model)
        return hidden(model, group)

    monkeypatch.setattr(type(teacher), "hidden", count)
    heldout = HeldoutSet(teacher, pairs, 64, room)
    figures = [heldout.evaluate(student) for _ in range(3)]
    assert figures[0] == figures[1] == figures[2], "bit for bit"
    assert figures[0] == HeldoutSet(teacher, pairs, 64, 0).evaluate(student)
    assert {0: "none", len(heldout): "all"}.get(heldout.kept_packs, "some") == kept
    by_teacher = sum(model is teacher for model in passes) - len(heldout)  # the comparison's own
    assert by_teacher == len(heldout) + 2 * (len(heldout) - heldout.kept_packs)


def test_unconditional_prefix(tmp_path: Path) -> None:
    from megatron_npd.teacher.prefix import unconditional_prefix

    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False)
    header = unconditional_prefix(tokenizer, "assistant_header")
    (whole,) = tokenizer.chat_ids([[{"role": "user", "content": "hello"}]])
    assert header and whole[-len(header) :] == header
    assert unconditional_prefix(tokenizer, "auto") == header, "a BOS that is never prepended is no document start"
    tokenizer.encoder.bos_token = None
    with pytest.raises(UserError, match="has no BOS token"):
        unconditional_prefix(tokenizer, "bos")


def test_cut_responses_are_scored_where_that_may_keep_them(
    models: dict, folders: dict[str, Path], tmp_path: Path
) -> None:
    from megatron_npd.teacher.annotation import annotate_shard

    pairs = [(prompt, np.append(response[:-1], [7, 8]).astype(np.int32)) for prompt, response in pairs_of(4)]
    shard = make_rollouts(pairs, [FinishReason.LENGTH] * 4, folders["student"])
    config = make_config(folders, tmp_path)
    keeping = config.model_copy(update={"selection": config.selection.model_copy(update={"reject_truncated": False})})
    prefix, ends = np.array([1], np.int32), frozenset({EOS})
    for used, is_scored in ((config, False), (keeping, True)):
        samples, tokens = annotate_shard(
            shard, used, rule_of(used.selection), models["teacher"], models["student"], prefix, ends, VOCAB_SIZE
        )
        assert np.isfinite(samples["delta_ifd"]).all() == is_scored and (tokens > 0) == is_scored
        assert (samples["verdict"] == Verdict.TRUNCATED).all() != is_scored
