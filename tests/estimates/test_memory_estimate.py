"""The memory estimate: parameters against real checkpoints, activations against autograd, disk against real files.

What whole processes take is compared in test_pipeline.py, with the run that is made there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_models import make_model

from megatron_npd.buffer.plan import make_plan
from megatron_npd.config import Config
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.estimates import role_memory
from megatron_npd.estimates.disk import disk_estimate
from megatron_npd.estimates.parameters import Widths, layer_parameters, stage_parameters
from megatron_npd.estimates.rates import SampleRates
from megatron_npd.estimates.role_memory import (
    annotator_memory,
    layer_activation_bytes,
    rollout_memory,
    trainer_memory,
)
from megatron_npd.kernels import vocab_parallel
from megatron_npd.models.hf_config import ModelDims, read_model_dims
from megatron_npd.schema import COLUMNS
from megatron_npd.vllm_engine import start

DIMS = ModelDims(
    family="llama",
    vocab_size=130,
    hidden_size=96,
    intermediate_size=160,
    num_layers=4,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=4096,
    tied_embeddings=False,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "openpangu"])
def test_parameters_are_those_of_the_checkpoint(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_model(family, tmp_path / "model", 0, tied=tied)
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - not a dictionary
    assert stage_parameters(read_model_dims(folder)) == count


def test_ranks_and_stages_add_up() -> None:
    whole = stage_parameters(DIMS)
    assert sum(stage_parameters(DIMS, 1, 2, stage) for stage in (0, 1)) == whole
    norms = 2 * DIMS.hidden_size
    even = ModelDims(**{**vars(DIMS), "num_heads": 8, "num_kv_heads": 4, "vocab_size": 128})
    assert 2 * (layer_parameters(even, 2) - norms) == layer_parameters(even) - norms
    assert Widths.of(DIMS, 2).key_heads == 2, "3 heads are padded to 4"
    tied = ModelDims(**{**vars(DIMS), "tied_embeddings": True})
    assert stage_parameters(tied, 1, 2, 0) + stage_parameters(tied, 1, 2, 1) == whole, "the last stage has a copy"


KEPT_OF = 1024
"""Tokens of the pack whose activations are counted."""


def configuration(**training: Any) -> Config:
    return Config.model_validate(
        {
            "run_directory": "run",
            "models": {"teacher": "t", "student": "s", "dtype": training.pop("dtype", "bfloat16")},
            "prompts": {"train": "a", "heldout": "b", "max_prompt_tokens": 64},
            "rollout": {"max_new_tokens": 64, "samples_per_unit": 10},
            "annotator": {"pack_length": 512, "top_k": 4},
            "training": {"sequence_length": 512, "global_batch_size": 8} | training,
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "block", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_are_what_autograd_keeps(dtype: str, recompute: str, qk_norm: bool, parallel: Parallel) -> None:
    """Of one layer more, each storage once, in a real Megatron model; parameters are not counted. Of a block of one
    layer the second is kept."""
    config = configuration(dtype=dtype, recompute=recompute, sequence_length=KEPT_OF)
    dims = replace(DIMS, qk_norm=qk_norm)
    kept = {layers: kept_bytes(replace(dims, num_layers=layers), dtype, recompute, parallel) for layers in (1, 2)}
    estimated = layer_activation_bytes(config.training, dims, 2 if dtype == "bfloat16" else 4, "cpu")
    assert (kept[2] - kept[1]) / config.training.sequence_length == pytest.approx(estimated, rel=0.005)


def test_a_block_of_all_layers_is_all_of_them_and_one_of_fewer_is_between() -> None:
    def activations(**training: Any) -> float:
        return terms(trainer_memory(configuration(**training), DIMS, "gpu"))["activations"]

    layers = DIMS.num_layers
    assert activations(recompute="block", recompute_layers=layers) == activations(recompute="full")
    one, two = (activations(recompute="block", recompute_layers=count) for count in (1, 2))
    assert activations(recompute="full") <= two < one
    whole = activations(recompute="none")  # and of those that are computed again, one at a time is there as a whole
    assert one - two == pytest.approx((whole - (activations(recompute="full") - whole / layers)) / layers)


def test_each_chunk_of_an_interleaved_pipeline_has_its_block() -> None:
    """Two stages of two chunks of one layer: a block of one layer is all of them."""

    def activations(**training: Any) -> float:
        stages = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
        return terms(trainer_memory(configuration(**training, **stages), DIMS, "gpu"))["activations"]

    assert activations(recompute="block", recompute_layers=1) == activations(recompute="full")


def kept_bytes(dims: ModelDims, dtype: str, recompute: str, parallel: Parallel) -> int:
    from megatron_npd.mcore.model import ModelOptions, build_gpt, forward_packed

    [model] = build_gpt(dims, parallel, getattr(torch, dtype), ModelOptions("reference", False, recompute))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    alive = []  # or an address would be used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    bounds = np.array([0, 288, 608, KEPT_OF], dtype=np.int32)  # multiples of 32, none short: see mcore.attention
    tokens, rows = torch.zeros(KEPT_OF, dtype=torch.int64), torch.arange(50)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = forward_packed(model, tokens, bounds, rows, parallel)
    hidden.sum().backward()  # or a layer that recomputes and its graph hold each other, and Megatron's groups, for good
    return sum(storages.values())


def terms(estimate: Any) -> dict[str, float]:
    return {term.name: term.bytes for term in estimate.terms}


def test_a_distributed_optimizer_divides_its_state_alone() -> None:
    alone = terms(trainer_memory(configuration(), DIMS, "gpu"))
    split = terms(trainer_memory(configuration(data_parallel_size=4, distributed_optimizer=True), DIMS, "gpu"))
    for name in ("Adam's moments", "main weights"):
        assert split[name] == alone[name] / 4
    assert split["gradients"] == alone["gradients"] == 4 * stage_parameters(DIMS)


def test_float32_needs_no_main_weights() -> None:
    assert "main weights" not in terms(trainer_memory(configuration(dtype="float32"), DIMS, "gpu"))


def test_the_first_stage_holds_a_micro_batch_for_each_stage() -> None:
    deep = ModelDims(**{**vars(DIMS), "vocab_size": 128})
    one = trainer_memory(configuration(), deep, "gpu")
    four = trainer_memory(configuration(pipeline_model_parallel_size=4), deep, "gpu")
    assert terms(four)["activations"] == terms(one)["activations"], "a quarter of the layers, four micro-batches"
    assert "logits" not in terms(four)
    short = trainer_memory(configuration(pipeline_model_parallel_size=4, global_batch_size=2), deep, "gpu")
    assert terms(short)["activations"] == terms(one)["activations"] / 2, "there are only two micro-batches"


def test_the_last_stage_is_the_fullest_where_the_vocabulary_is_large() -> None:
    wide = ModelDims(**{**vars(DIMS), "vocab_size": 150_000})
    assert "logits" in terms(trainer_memory(configuration(pipeline_model_parallel_size=4), wide, "gpu"))


def test_logits_are_those_of_a_chunk() -> None:
    chunked = terms(trainer_memory(configuration(logits_chunk_tokens=128), DIMS, "gpu"))
    assert chunked["logits"] == 2 * 128 * 130
    config = configuration()  # of a pack of 512 tokens half are of responses
    for device, rows in {"cpu": 64, "gpu": 256}.items():  # on a GPU as many as there are: 1,024 at most
        evaluating = terms(annotator_memory(config, DIMS, DIMS, device))
        assert (evaluating["logits"], evaluating["their KL"]) == (2 * 2 * 256 * 130, 7 * 4 * rows * 130)


def test_a_teachers_sidecar_stages_no_version() -> None:
    assert "version that is staged" not in terms(rollout_memory(configuration(), DIMS, "cpu", refreshed=False))
    assert "version that is staged" in terms(rollout_memory(configuration(), DIMS, "cpu"))


def test_an_engine_is_as_full_as_there_are_responses_for_it() -> None:
    """Units are no limit: it is kept full across them."""
    few, many, unknown = (
        terms(rollout_memory(configuration(), DIMS, "cpu", responses=n))["logits"] for n in (100, 10**6, None)
    )
    assert (few, many, unknown) == tuple(2 * 4 * sequences * DIMS.vocab_size for sequences in (100, 256, 256))


def test_a_cuda_build_of_torch_is_known_by_its_files() -> None:
    assert role_memory.torch_is_cuda_build() == (torch.version.cuda is not None)


def test_a_cuda_build_of_torch_takes_more_of_a_cpu_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {}
    for cuda in (False, True):
        monkeypatch.setattr(role_memory, "torch_is_cuda_build", lambda cuda=cuda: cuda)
        config = configuration()
        taken[cuda] = [
            trainer_memory(config, DIMS, "cpu").bytes,
            annotator_memory(config, DIMS, DIMS, "cpu").bytes,
            rollout_memory(config, DIMS, "cpu").bytes,
        ]
    assert [most - least for least, most in zip(*taken.values(), strict=True)] == [role_memory.CUDA_BUILD_BYTES] * 3
    assert "CUDA's libraries" not in terms(trainer_memory(configuration(), DIMS, "gpu")), "not of the GPU's memory"


def test_sizes_that_other_rooms_decide_are_theirs() -> None:
    """Estimates load neither: they have the numbers by heart."""
    assert role_memory.BATCHED_TOKENS == start.BATCHED_TOKENS
    assert role_memory.SEQUENCES == start.SEQUENCES
    assert role_memory.KL_TOKENS == {"cpu": vocab_parallel.CHUNK, "gpu": vocab_parallel.CHUNK_ON_GPU}


def test_the_buffer_takes_what_was_estimated(tmp_path: Path) -> None:
    """Real shards of the lengths that are assumed."""
    config = configuration()
    plan = make_plan(config, 100, 20)  # two rounds of 100 samples, and 20 held-out responses
    samples = SampleRates(prompt_tokens=50.0, response_tokens=60.0, kept_share=0.5, kept_tokens=110.0)
    estimated = disk_estimate(config, plan, DIMS, samples)
    assert estimated.samples == pytest.approx(shard_bytes(tmp_path, "samples", 200), rel=0.02)
    assert estimated.rollouts == pytest.approx(shard_bytes(tmp_path, "rollouts", 220), rel=0.02)
    most = disk_estimate(config, plan, DIMS)
    assert most.samples > estimated.samples and most.rollouts > estimated.rollouts
    assert most.versions == estimated.versions == 3 * 2 * stage_parameters(DIMS)


def shard_bytes(folder: Path, kind: str, rows: int) -> int:
    """Of a file with `rows` samples of 50 + 60 tokens, half of them kept."""
    sizes = {"N": rows, "N+1": rows + 1, "P": 50 * rows, "R": 60 * rows, "A": 30 * rows, "K": 4}
    columns = {
        name: np.zeros([sizes[letter] for letter in dimensions.split(",")], dtype)
        for name, (dtype, dimensions) in COLUMNS[kind].items()
    }
    file = folder / f"{kind}.safetensors"
    save_file(columns, file)
    return file.stat().st_size
