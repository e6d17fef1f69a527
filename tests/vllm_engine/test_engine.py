"""The rollout sidecar with a real vLLM engine: what it samples, what it serves after an update in place, and the role.

Hugging Face transformers is the reference throughout, in float32.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import (
    LONGEST,
    ROLLOUT,
    TOLERANCE,
    largest_difference,
    published,
    refresh,
    requests,
    rewrite,
    start,
)
from megatron_runs import run_ranks
from places import SUPPORT
from safetensors.torch import load_file, save_file
from tiny_models import EOS, LLAMA3_ROPE, hf_logprobs, make_llama, make_model, probe_sequences, publish

from megatron_npd.buffer.shards import read_shard
from megatron_npd.config import Config
from megatron_npd.data.prompts import save_prompt_set
from megatron_npd.errors import BadVersionError
from megatron_npd.process.metrics import read_metrics
from megatron_npd.rollout import sidecar
from megatron_npd.rollout.parity import ParityError, check_parity
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION, FinishReason
from megatron_npd.versions.manifest import ParityProbe, read_parity_probe, write_manifest
from megatron_npd.vllm_engine.engine import Request, RolloutEngine, RolloutError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("engines_live_on")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory, engines_live_on):
    """An engine shared by the tests below, which may refresh it to newer versions as they like."""
    return start(published(tmp_path_factory.mktemp("start"), 0, tied=True), 0)


@pytest.fixture
def next_version(engine, tmp_path):
    """Folder of a version that may replace the served one, in several files."""
    return published(tmp_path, engine.version + 1, tied=True, split=True)


# --- generation -----------------------------------------------------------------------------------------------------


def test_behaviour_logprobs_are_the_models_at_temperature_1(engine, next_version):
    refresh(engine, next_version)
    asked = requests(temperature=0.7, top_p=0.9)
    for request, response in zip(asked, engine.generate(asked), strict=True):
        (reference,) = hf_logprobs(next_version, [request.prompt_ids + response.ids])
        assert largest_difference([response.logprobs], [reference[len(request.prompt_ids) - 1 :]]) < TOLERANCE
        assert response.version == engine.version


def test_end_token_is_kept_and_others_run_to_the_limit(engine):
    responses = engine.generate(requests(64))
    stopped = [response for response in responses if response.finish_reason is FinishReason.STOP]
    cut = [response for response in responses if response.finish_reason is FinishReason.LENGTH]
    assert stopped and cut and len(stopped) + len(cut) == 64
    assert all(response.ids[-1] == EOS and response.ids.count(EOS) == 1 for response in stopped)
    assert all(len(response.ids) == 40 and EOS not in response.ids for response in cut)
    assert all(len(response.ids) == len(response.logprobs) for response in responses)


def test_stop_ids_are_the_callers_and_not_the_checkpoints(engine):
    unstopped = engine.generate(requests(64, stop_token_ids=[]))
    assert all(len(response.ids) == 40 for response in unstopped)
    assert any(EOS in response.ids[:-1] for response in unstopped)
    other = unstopped[0].ids[5]
    (stopped,) = engine.generate(requests(1, stop_token_ids=[other]))
    assert stopped.ids == unstopped[0].ids[: unstopped[0].ids.index(other) + 1]
    assert stopped.finish_reason is FinishReason.STOP


def test_same_seed_same_response_and_another_seed_another(engine):
    first, second = engine.generate(requests()), engine.generate(requests())
    assert [response.ids for response in first] == [response.ids for response in second]
    prompt = requests(1)[0].prompt_ids
    many = engine.generate([Request(prompt, seed, 20, [EOS]) for seed in range(8)])
    assert len({tuple(response.ids) for response in many}) == 8


def test_a_response_joins_and_leaves_the_batch_at_any_time(engine):
    """And is, to rounding, what it is in a batch of its own."""
    asked = requests(12, stop_token_ids=[])
    expected, tickets, found = engine.generate(asked), {}, {}
    for number, request in enumerate(asked):
        tickets[engine.begin(request)] = number
        for _ in range(5):
            found |= {tickets[ticket]: response for ticket, response in engine.step()}
    assert 0 < engine.running < 12, "some began after others had left"
    with pytest.raises(RolloutError, match=f"{engine.running} other requests are running"):
        engine.generate(asked)
    while engine.running:
        found |= {tickets[ticket]: response for ticket, response in engine.step()}
    assert [found[number].ids for number in range(12)] == [response.ids for response in expected]
    ours, theirs = (
        [response.logprobs for response in responses] for responses in (map(found.get, range(12)), expected)
    )
    assert largest_difference(ours, theirs) < TOLERANCE


def test_aborted_request_is_sampled_again(engine, monkeypatch):
    expected = engine.generate(requests())
    abort_newest(engine, monkeypatch, times=1)
    assert [response.ids for response in engine.generate(requests())] == [response.ids for response in expected]


def test_request_aborted_twice_is_an_error_and_not_a_sample(engine, monkeypatch):
    abort_newest(engine, monkeypatch, times=2)
    with pytest.raises(RolloutError, match="gave up twice on a request of 12 prompt tokens"):
        engine.generate(requests())
    monkeypatch.undo()
    assert engine.running == 0 and not engine._llm.has_unfinished_requests()
    assert len(engine.generate(requests())) == 8


def abort_newest(engine, monkeypatch, times: int) -> None:
    """Abort the newest request before each of the next `times` steps: the one that replaces it is the newest then."""
    step, left = engine._llm.step, itertools.count(times, -1)

    def abort_then_step():
        if next(left) > 0:
            engine._llm.abort_request([max(engine._llm.output_processor.external_req_ids, key=int)])
        return step()

    monkeypatch.setattr(engine._llm, "step", abort_then_step)


def test_logprobs_are_the_models(engine, next_version):
    refresh(engine, next_version)
    sequences = [*probe_sequences(3), [5, 6], probe_sequences(4, 1, LONGEST)[0]]
    assert largest_difference(engine.logprobs(sequences), hf_logprobs(next_version, sequences)) < TOLERANCE


# --- updates in place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refresh_equals_a_fresh_engine(tmp_path, tied, dtype):
    """Tied embeddings: vLLM alone would go on with the old output head."""
    old, new = (published(tmp_path, version, tied=tied, dtype=dtype) for version in (0, 1))
    engine, fresh = (RolloutEngine(folder, i, ROLLOUT, str(dtype)[6:], LONGEST) for i, folder in enumerate((old, new)))
    refresh(engine, new)
    assert engine.logprobs(probe_sequences()) == fresh.logprobs(probe_sequences())
    assert engine.generate(requests()) == fresh.generate(requests())
    if dtype is torch.float32:
        assert largest_difference(engine.logprobs(probe_sequences()), read_parity_probe(new).logprobs) < TOLERANCE


WORKER = SUPPORT / "refresh_worker.py"
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads that divide over two ranks; the other models' one key-value head is padded."""
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama tied": ("llama", {"tied": True}),
    "llama untied, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE} | WIDE),
    "llama with attention_bias": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tied": True}),
    "openpangu tied": ("openpangu", {"tied": True} | WIDE),
    "openpangu untied": ("openpangu", {}),
}


@pytest.fixture(scope="module")
def trained_versions(tmp_path_factory) -> dict[str, RunDirectory]:
    """A run directory for each family, with versions 0 and 1 published by one real trainer group at TP 2 × PP 2."""
    root = tmp_path_factory.mktemp("trained")
    runs = {}
    for seed, (name, (family, options)) in enumerate(FAMILIES.items()):
        run = RunDirectory(root / name.replace(" ", "_"))
        student = make_model(family, run.root / "student", seed, **options)
        save_prompt_set(run.prompts("heldout"), ["a", "b", "c"], probe_sequences(seed))
        config = Config.model_validate(
            {
                "run_directory": str(run.root),
                "models": {"teacher": "-", "student": str(student), "dtype": "float32"},
                "prompts": {"train": "-", "heldout": "-", "max_prompt_tokens": 16},
                "rollout": {"max_new_tokens": 16},
                "training": {
                    "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_length": 96, "lr": 0.1
                },
            }
        )  # fmt: skip
        run.config.write_text(config.to_toml())
        runs[name] = run
    run_ranks([sys.executable, str(WORKER), json.dumps([str(run.config) for run in runs.values()])], 4, root / "meet")
    return runs


def test_engine_over_two_processes_is_refreshed(tmp_path):
    """Its workers are processes of their own: they must know our update and openPangu, and read what is staged here."""
    old, new = (published(tmp_path, version, "openpangu", tied=True, **WIDE) for version in (0, 1))
    rollout = ROLLOUT.model_copy(update={"tensor_model_parallel_size": 2})
    engine = RolloutEngine(old, 0, rollout, "float32", LONGEST)
    refresh(engine, new)
    assert check_parity(engine, read_parity_probe(new), ROLLOUT).max < TOLERANCE


def test_the_engine_reads_the_files_that_the_index_says(tmp_path):
    """Old copies lie in a listed file, beside them, and under the name of Mistral's own format."""
    folder = make_llama(tmp_path / "teacher", 5, tied=False, split=True)
    expected = hf_logprobs(folder, probe_sequences())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: load_file(folder / file)[name] for name, file in index.items()}
    old = {name: torch.full_like(tensor, 0.5) for name, tensor in tensors.items()}
    for file in set(index.values()):
        mine = {name: tensors[name] for name, of in index.items() if of == file}
        save_file(old | mine, folder / file, {"format": "pt"})
    for stale in ("consolidated.safetensors", "model.safetensors", "z.safetensors"):
        save_file(old, folder / stale, {"format": "pt"})
    engine = start(folder, TEACHER_VERSION)
    assert largest_difference(engine.logprobs(probe_sequences()), expected) < TOLERANCE


def test_openpangus_own_code_is_not_run(tmp_path):
    """Released checkpoints bring a configuration class, which transformers would otherwise need."""
    folder, marker = make_model("openpangu", tmp_path / "v000000", 5), tmp_path / "code_was_run"
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "configuration_openpangu_dense.py").write_text(f"open({str(marker)!r}, 'w')\n")
    engine = start(publish(folder, 0), 0)
    assert largest_difference(engine.logprobs(probe_sequences()), read_parity_probe(folder).logprobs) < TOLERANCE
    assert not marker.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_trainers_versions_of_every_family_are_served(trained_versions, family):
    """Start on A, refresh to B: a fresh engine's logprobs, the trainer's own, and transformers'."""
    old, new = (trained_versions[family].version(version) for version in (0, 1))
    engine, fresh = start(old, 0), start(new, 1)
    parity = check_parity(engine, read_parity_probe(old), ROLLOUT)
    assert parity.max < TOLERANCE
    before = engine.logprobs(probe_sequences())
    refresh(engine, new)
    assert check_parity(engine, read_parity_probe(new), ROLLOUT).max < TOLERANCE
    after = engine.logprobs(probe_sequences())
    assert largest_difference(after, before) > 1, "the two versions must differ for this to show anything"
    assert after == fresh.logprobs(probe_sequences())
    assert largest_difference(after, hf_logprobs(new, probe_sequences())) < TOLERANCE
    assert engine.generate(requests()) == fresh.generate(requests())


def test_prefix_cache_does_not_outlive_its_weights(engine, next_version):
    asked = requests(4, length=150)  # longer than vLLM's block, so that it is cached
    engine.generate(asked)
    name = engine._llm.add_request("probe", {"prompt_token_ids": asked[0].prompt_ids}, sampling_of(asked[0]))
    outputs = finish(engine)
    assert outputs[0].num_cached_tokens > 0, f"{name}: the cache is off, this test would show nothing"
    refresh(engine, next_version)
    for request, response in zip(asked, engine.generate(asked), strict=True):
        (reference,) = hf_logprobs(next_version, [request.prompt_ids + response.ids])
        assert largest_difference([response.logprobs], [reference[len(request.prompt_ids) - 1 :]]) < TOLERANCE


def test_refresh_with_running_requests_is_refused_and_they_finish(engine, next_version):
    for number, request in enumerate(requests(stop_token_ids=[])):
        engine._llm.add_request(f"running-{number}", {"prompt_token_ids": request.prompt_ids}, sampling_of(request))
    for _ in range(5):
        engine._llm.step()
    version = engine.version
    with pytest.raises(RolloutError, match="requests are running"):
        refresh(engine, next_version)
    outputs = finish(engine)
    assert len(outputs) == 8 and engine.version == version
    for output in outputs:
        assert [span.version for span in output.outputs[0].weight_versions] == [str(version)]
    refresh(engine, next_version)
    assert engine.generate(requests(1))[0].version == version + 1


def sampling_of(request: Request):
    from megatron_npd.vllm_engine.engine import _sampling

    return _sampling(request)


def finish(engine: RolloutEngine) -> list:
    outputs = []
    while engine._llm.has_unfinished_requests():
        outputs += engine._llm.step()
    return outputs


# --- parity ---------------------------------------------------------------------------------------------------------


def test_parity_check_passes_the_right_weights_and_only_those(engine, next_version, tmp_path):
    refresh(engine, next_version)
    probe = read_parity_probe(next_version)
    parity = check_parity(engine, probe, ROLLOUT)
    assert parity.mean <= parity.max < TOLERANCE
    foreign = read_parity_probe(published(tmp_path / "foreign", engine.version, tied=True))
    with pytest.raises(ParityError, match=rf"version {engine.version}: .* mean difference .* largest"):
        check_parity(engine, foreign, ROLLOUT)


def test_parity_check_fails_on_nan_and_on_nothing(engine):
    probe = ParityProbe([[5, 6, 7]], [[float("nan"), -1.0]])
    with pytest.raises(ParityError, match="nan"):
        check_parity(engine, probe, ROLLOUT)
    with pytest.raises(ParityError, match="against"):
        check_parity(engine, ParityProbe([[5, 6, 7]], [[-1.0]]), ROLLOUT)
    with pytest.raises(ParityError, match="against"):
        check_parity(engine, ParityProbe([], []), ROLLOUT)


def test_not_a_number_weights_fail_parity_and_generation(tmp_path):
    folder = published(tmp_path, 0)
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    engine = start(folder, 0)
    with pytest.raises(ParityError, match="nan"):
        check_parity(engine, read_parity_probe(folder), ROLLOUT)
    with pytest.raises(RolloutError, match="unusable logprobs"):
        engine.generate(requests(1))


# --- the role -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return make_llama(folder / "teacher", 1), make_llama(folder / "student", 2, tied=True)


def make_run(root: Path, models: tuple[Path, Path], prompts: int = 3) -> tuple[Config, RunDirectory]:
    """A run of two rounds of 6 prompts × 2 samples in units of 5, with version 0 published; `prompts` are held out."""
    config = Config.model_validate(
        {
            "run_directory": str(root),
            "models": {"teacher": str(models[0]), "student": str(models[1]), "dtype": "float32"},
            "prompts": {"train": "-", "heldout": "-", "max_prompt_tokens": 16},
            "rounds": {"count": 2, "samples_per_prompt": 2},
            "rollout": {
                "max_new_tokens": 24,
                "samples_per_unit": 5,
                "kv_cache_gib": 0.05,
                "max_num_seqs": 8,
                "threads": 1,
            },
            "launch": {"turns": "on", "poll_seconds": 0.02},
        }
    )
    run = RunDirectory(root)
    save_prompt_set(run.prompts("train"), [f"t{i}" for i in range(6)], probe_sequences(11, 6, 9))
    save_prompt_set(run.prompts("heldout"), [f"h{i}" for i in range(prompts)], probe_sequences(12, prompts, 9))
    publish(shutil.copytree(models[1], run.version(0)), 0)
    return config, run


def publish_when(condition, run: RunDirectory, version: int) -> threading.Thread:
    """Publish a version, in one rename, as soon as `condition()` holds."""

    def wait_and_publish() -> None:
        folder = publish(make_llama(run.weights / f".staging-{version}", 50 + version, tied=True), version)
        while not condition():
            threading.Event().wait(0.02)
        folder.rename(run.version(version))

    thread = threading.Thread(target=wait_and_publish, daemon=True)
    thread.start()
    return thread


def shards_of(run: RunDirectory, stage: str, units: int) -> list:
    return [read_shard(run.unit("rollouts", stage, unit), "rollouts") for unit in range(units)]


def check_shards(shards: list, version: int, weights: Path) -> None:
    for shard in shards:
        assert set(shard["policy_version"]) == {version}
        rows = range(len(shard))
        sequences = [[*shard.prompt(row).tolist(), *shard.response(row).tolist()] for row in rows]
        for row, reference in zip(rows, hf_logprobs(weights, sequences), strict=True):
            ours = shard.ragged("behaviour_logprobs", row, "response_offsets")
            assert np.abs(ours - reference[len(shard.prompt(row)) - 1 :]).max() < TOLERANCE
            assert (shard["finish_reason"][row] == FinishReason.STOP) == (shard.response(row)[-1] == EOS)


def identities(shards: list) -> list[tuple[int, int]]:
    return sorted(pair for shard in shards for pair in zip(shard["prompt_index"], shard["sample_index"], strict=True))


def test_student_sidecar_follows_the_published_versions(tmp_path, models, monkeypatch):
    config, run = make_run(tmp_path, models)
    shutil.copytree(run.version(0), run.weights / ".staging-v000001-0badcafe")  # of a writer that was killed
    (run.weights / ".staging-v000001-0badcafe" / "version.json").unlink()
    publisher = publish_when(lambda: run.unit("rollouts", "round_0000", 2).exists(), run, 1)
    sidecar.run(config, "student")
    publisher.join()

    everything = [(prompt, sample) for prompt in range(6) for sample in range(2)]
    rounds = {version: shards_of(run, f"round_{version:04d}", 3) for version in (0, 1)}
    for version, shards in rounds.items():
        assert identities(shards) == everything
        check_shards(shards, version, run.version(version))
    events = [record for record in read_metrics(run.root / "metrics") if record["event"] != "memory"]
    assert [event["event"] for event in events] == ["start", *["unit"] * 3, "refresh", *["unit"] * 3]
    assert all(event["parity_max"] < TOLERANCE for event in events if "version" in event)
    refreshed = events[4]
    assert (refreshed["version"], refreshed["seconds"]) == (1, refreshed["stall_seconds"])
    assert refreshed["bytes"] == sum(file.stat().st_size for file in run.version(1).glob("*.safetensors"))
    assert refreshed["verify_seconds"] > 0 and refreshed["stall_seconds"] > 0

    # Joining late: round 0 is complete and its weights are gone; a lost unit of round 1 is redone as it was.
    shutil.rmtree(run.version(0))
    run.unit("rollouts", "round_0001", 1).unlink()
    sidecar.run(config, "student")
    (redone,) = [shards_of(run, "round_0001", 3)[1]]
    np.testing.assert_array_equal(redone["response_ids"], rounds[1][1]["response_ids"])
    # Nothing left: no engine is started.
    monkeypatch.setattr(sidecar, "RolloutEngine", None)
    sidecar.run(config, "student")


def test_student_sidecar_ends_at_a_bad_version_and_goes_on_once_it_is_good(tmp_path, models):
    config, run = make_run(tmp_path, models)
    publish_when(lambda: True, run, 1).join()
    (weights,) = run.version(1).glob("*.safetensors")
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    with pytest.raises(BadVersionError, match=r"v000001/model.safetensors: content differs"):
        sidecar.run(config, "student")
    assert identities(shards_of(run, "round_0000", 3)) and not run.unit("rollouts", "round_0001", 0).exists()
    weights.write_bytes(good)
    sidecar.run(config, "student")
    check_shards(shards_of(run, "round_0001", 3), 1, run.version(1))


def test_teacher_sidecar_generates_the_heldout_set(tmp_path, models):
    config, run = make_run(tmp_path, models)
    sidecar.run(config, "teacher")
    shards = shards_of(run, "heldout", 1)
    assert identities(shards) == [(0, 0), (1, 0), (2, 0)]
    check_shards(shards, TEACHER_VERSION, models[0])


def test_the_engine_stays_full_across_units(tmp_path, models, monkeypatch):
    """Steps, not seconds: of units of 4 it needs hardly more than of one unit that holds all samples."""
    steps: Counter[str] = Counter()
    step = RolloutEngine.step

    def counted(engine: RolloutEngine):
        steps[name] += 1
        return step(engine)

    monkeypatch.setattr(RolloutEngine, "step", counted)
    student = shutil.copytree(models[1], tmp_path / "student")
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 10))}))
    shares = {}
    for name, samples_per_unit in {"units of 4": 4, "one unit": 1000}.items():
        config, run = make_run(tmp_path / name, (models[0], student), prompts=60)
        sizes = {"samples_per_unit": samples_per_unit, "max_new_tokens": 42, "temperature": 2.0}
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update=sizes)})
        sidecar.run(config, "teacher")
        units = [record for record in read_metrics(run.root / "metrics") if record["event"] == "unit"]
        shares[name] = sum(u["samples"] * (1 - u["finished_share"]) for u in units) / sum(u["samples"] for u in units)
        assert len(units) == -(-60 // samples_per_unit)
    assert shares["units of 4"] == pytest.approx(shares["one unit"]) == pytest.approx(0.1, abs=0.05), "at the limit"
    assert steps["units of 4"] <= steps["one unit"] / 0.9, steps


def test_student_sidecar_ends_when_parity_fails(tmp_path, models):
    config, run = make_run(tmp_path, models)
    other = published(tmp_path / "other", 0, tied=True)
    shutil.copy(other / "parity.json", run.version(0))
    write_manifest(run.version(0), 0)
    with pytest.raises(ParityError, match=r"version 0: .* mean difference .* largest"):
        sidecar.run(config, "student")
    assert not (run.root / "rollouts").exists()
