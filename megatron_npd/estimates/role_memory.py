"""Memory of each role's processes, term by term with the formula, from configuration and dimensions alone.

Counted is what one process holds at its fullest moment: on a GPU the device memory that torch takes, on a CPU what the
kernel cannot take back (`process.memory`). The terms of activations follow what the layers keep for their backward
pass, tensor by tensor (`tests/estimates/test_memory_estimate.py` counts them in a real model). After Korthikanti et
al., arXiv 2205.05198, for SwiGLU, grouped queries and packed sequences, without dropout and without materialised
scores.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.config import Config, TrainingConfig
from megatron_npd.estimates.parameters import Widths, stage_parameters
from megatron_npd.hardware.device import Device
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.roles import ANNOTATOR, ROLLOUT, ROLLOUT_TEACHER, TRAINER

MIB = 2**20
PROCESS_BYTES = {TRAINER: 248 * MIB, ANNOTATOR: 276 * MIB, ROLLOUT: 420 * MIB}
"""On a CPU, of a process with a model of no size: Python, torch 2.13 built for CPUs, Megatron-Core, vLLM; measured, and
the same with Megatron-Core 0.16.1 and 0.19.2. On a GPU that is host memory, and what CUDA and NCCL take comes on top of
the estimate."""
CUDA_BUILD_BYTES = 136 * MIB
"""The same, more with a CUDA build of torch, which loads NVIDIA's libraries also where there is no GPU; measured."""
KERNELS_BYTES = 60 * MIB
"""On a CPU, of the kernels oneDNN compiles and keeps for a model in 16 bit; measured."""
KERNELS_OF_A_BATCH_SIZE_BYTES = 1.25 * MIB
"""The same, for each number of sequences vLLM decodes at once: they end one by one, so it meets all of them."""
BATCHED_TOKENS = 8192
"""Most prompt tokens vLLM computes at once on a CPU (`vllm_engine.start`)."""
SEQUENCES = 256
"""Sequences it decodes at once unless told otherwise, the same on a GPU of less than 70 GiB."""
KL_TOKENS: dict[Device, int] = {"cpu": 64, "gpu": 1024}
"""Rows `kernels.forward_kl` takes at a time."""


@dataclass(frozen=True)
class Term:
    """One kind of memory."""

    name: str
    formula: str
    bytes: float


@dataclass(frozen=True)
class RoleMemory:
    """One process of a role; of several unlike ones the fullest."""

    role: str
    device: Device
    terms: Sequence[Term]

    @property
    def bytes(self) -> float:
        return sum(term.bytes for term in self.terms)


def element_bytes(config: Config) -> int:
    """Bytes of a number in the compute dtype, which must be decided."""
    assert config.models.dtype != "auto", "a configuration as it is in a run directory, or after `decide_dtype`"
    return 2 if config.models.dtype == "bfloat16" else 4


def trainer_memory(config: Config, dims: ModelDims, device: Device) -> RoleMemory:
    """The fullest trainer rank: of the first pipeline stage, which keeps the most micro-batches, or of the last, which
    has the logits."""
    stages = {0, config.training.pipeline_model_parallel_size - 1}
    candidates = [RoleMemory(TRAINER, device, _trainer_terms(config, dims, device, stage)) for stage in stages]
    return max(candidates, key=lambda memory: memory.bytes)


def _trainer_terms(config: Config, dims: ModelDims, device: Device, stage: int) -> list[Term]:
    training, size = config.training, element_bytes(config)
    tensor, pipeline = training.tensor_model_parallel_size, training.pipeline_model_parallel_size
    parameters = stage_parameters(dims, tensor, pipeline, stage)
    shards = training.data_parallel_size * training.context_parallel_size if training.distributed_optimizer else 1
    split = f" / {shards} ranks" if shards > 1 else ""
    count = f"{parameters:,} parameters"
    terms = [
        *_process(device, TRAINER, size),
        Term("parameters", f"{size} bytes × {count}", size * parameters),
        Term("gradients", f"4 bytes × {count}", 4 * parameters),
        Term("Adam's moments", f"8 bytes × {count}{split}", 8 * parameters / shards),
    ]
    if size < 4:
        terms.append(Term("main weights", f"4 bytes × {count}{split}", 4 * parameters / shards))
    passing = [_activations(training, dims, size, device, stage)]
    if stage == pipeline - 1:
        passing += _loss_terms(training, dims, size)
    if device == "cpu":
        terms.append(_publication(training, dims, size))
    return [*terms, *_with_holes(device, passing)]


@functools.cache
def torch_is_cuda_build() -> bool:
    """Whether the installed torch is linked to CUDA, by its files: importing it would take seconds."""
    found = importlib.util.find_spec("torch")
    return found is not None and (Path(found.origin or "").parent / "lib" / "libtorch_cuda.so").exists()


def _process(device: Device, role: str, size: int) -> list[Term]:
    """What a process takes on a CPU without any model."""
    if device == "gpu":
        return []
    terms = [Term("process", "Python and its libraries, measured", PROCESS_BYTES[role])]
    if torch_is_cuda_build():
        terms.append(Term("CUDA's libraries", "of a CUDA build of torch, measured", CUDA_BUILD_BYTES))
    if size < 4:
        terms.append(Term("compiled kernels", "of oneDNN in 16 bit, measured", KERNELS_BYTES))
    return terms


def _with_holes(device: Device, passing: list[Term]) -> list[Term]:
    """Tensors of all sizes that come and go leave holes in a heap: on a CPU about as much again as they take (the
    quickstart's trainer at 1,024 and 2,048 tokens: 1.07 and 0.91). A GPU's allocator is not counted with any."""
    if device == "gpu":
        return passing
    return [*passing, Term("holes between these", "as much again, measured", sum(term.bytes for term in passing))]


def layer_activation_bytes(training: TrainingConfig, dims: ModelDims, size: int, device: Device) -> float:
    """What one layer keeps of one token until its backward pass, on one rank; with recompute = "block", one of those
    that are not computed again.

    Sequences of up to 256 tokens in float32 on a CPU, which attend together, differ by a tenth (`mcore.attention`).
    """
    tensor = training.tensor_model_parallel_size
    widths, hidden = Widths.of(dims, tensor), dims.hidden_size
    along = tensor if training.sequence_parallel else 1
    # A norm keeps its input and its normalised input in float32 and its output; fused, its input and output.
    norm = ((8 + size) * hidden + 4) / along if device == "cpu" else (2 * size * hidden + 4) / along
    if training.recompute == "full":
        return size * hidden / along
    attention = size * (4 * widths.query + 3 * widths.key) + 4 * widths.query_heads
    if device == "cpu":
        attention += 4 * size * dims.head_dim  # cosines and sines of queries and keys, for every layer
    if training.recompute == "selective":
        attention -= size * widths.query + 4 * widths.query_heads
    if dims.qk_norm:
        attention += 8 * widths.query + (8 if size < 4 else 4) * widths.key
        attention += 4 * (widths.query_heads + widths.key_heads)
    # Inputs of both matrix products, and what SwiGLU needs: fused, its input alone.
    mlp = (5 if device == "cpu" else 3) * size * widths.mlp
    return 2 * norm + attention + mlp


def _activations(training: TrainingConfig, dims: ModelDims, size: int, device: Device, stage: int) -> Term:
    pipeline, chunks = training.pipeline_model_parallel_size, training.virtual_pipeline_model_parallel_size
    layers = dims.num_layers // pipeline
    tokens = training.sequence_length // training.context_parallel_size

    def layer(recompute: str) -> float:
        return layer_activation_bytes(training.model_copy(update={"recompute": recompute}), dims, size, device)

    per_token = layer(training.recompute)
    # 1F1B: stage s holds as many micro-batches as there are stages from it on; interleaving adds a part of one.
    micro_batches = training.global_batch_size // training.data_parallel_size
    held: float = min(pipeline - stage, micro_batches)
    if chunks > 1:
        held += (pipeline - 1) / (pipeline * chunks)
    again = chunks * min(training.recompute_layers, layers // chunks) if training.recompute == "block" else 0
    formula = f"{per_token:,.0f} bytes × {tokens:,} tokens × {layers - again} layers"
    if again:
        formula = f"({formula} + {layer('full'):,.0f} bytes × {tokens:,} tokens × {again} layers)"
    formula += f" × {held:.3g} micro-batches" if pipeline > 1 else ""
    nbytes = (per_token * (layers - again) + layer("full") * again) * tokens * held
    if training.recompute in ("block", "full"):
        formula += f" + one layer of {layer('none'):,.0f} bytes a token"
        nbytes += layer("none") * tokens
    return Term("activations", formula, nbytes)


def _loss_terms(training: TrainingConfig, dims: ModelDims, size: int) -> list[Term]:
    """The fused loss (`kernels.linear`): one chunk of logits, the gradients of weight and hidden states."""
    columns = Widths.of(dims, training.tensor_model_parallel_size).vocabulary
    tokens = training.sequence_length // training.context_parallel_size
    chunk = min(training.logits_chunk_tokens, tokens)
    sums = size if chunk == tokens else size + 4  # more than one chunk is summed in float32
    hidden = dims.hidden_size
    return [
        Term("logits", f"{size} bytes × {chunk:,} tokens × {columns:,} columns", size * chunk * columns),
        Term(
            "gradient of the output layer",
            f"{sums} bytes × {columns:,} columns × {hidden:,}",
            sums * columns * hidden,
        ),
        Term("scored hidden states", f"{2 * size} bytes × {tokens:,} tokens × {hidden:,}", 2 * size * tokens * hidden),
    ]


def _publication(training: TrainingConfig, dims: ModelDims, size: int) -> Term:
    """A publication's copy of the weights stays (`weights.snapshot`), divided over the ranks that write it."""
    parameters, writers = stage_parameters(dims), training.world_size
    return Term(
        "copy that is published", f"{size} bytes × {parameters:,} parameters / {writers} ranks",
        size * parameters / writers,
    )  # fmt: skip


def annotator_memory(
    config: Config, teacher: ModelDims, student: ModelDims, device: Device, heldout_prompts: int = 0
) -> RoleMemory:
    """One annotator rank: teacher and student snapshot side by side, forward passes only. At its fullest it scores
    responses without their prompts, every position a row of logits; or evaluates, with the logits of both models."""
    size, tensor = element_bytes(config), config.annotator.tensor_model_parallel_size
    terms = _process(device, ANNOTATOR, size)
    for name, dims in (("teacher", teacher), ("student", student)):
        parameters = stage_parameters(dims, tensor)
        terms.append(Term(name, f"{size} bytes × {parameters:,} parameters", size * parameters))
    if device == "cpu":  # on a GPU's host it lies in the host's memory
        terms.append(_heldout_states(config, teacher, size, heldout_prompts))
    tokens = config.annotator.pack_length
    activations = _forward_activations(teacher, tensor, size, tokens)
    scoring, evaluating = _scoring_logits(config, teacher, size), _evaluation_logits(config, teacher, size, device)
    fullest = max([[scoring], evaluating], key=lambda logits: sum(term.bytes for term in logits))
    return RoleMemory(ANNOTATOR, device, [*terms, *_with_holes(device, [activations, *fullest])])


def _heldout_states(config: Config, teacher: ModelDims, size: int, prompts: int) -> Term:
    """What the annotator keeps of the teacher's pass over the held-out set (`teacher.heldout`), at most."""
    tokens, hidden = prompts * config.rollout.max_new_tokens, teacher.hidden_size
    most = min(size * tokens * hidden, int(config.annotator.heldout_cache_gib * 2**30))
    return Term("held-out hidden states", f"at most {size} bytes × {tokens:,} tokens × {hidden:,}", most)


def _forward_activations(dims: ModelDims, tensor: int, size: int, tokens: int) -> Term:
    """Of one layer at a time: an MLP's residual, input and products, or the float32 copies of a norm."""
    per_token = size * 2 * dims.hidden_size + max(5 * size * Widths.of(dims, tensor).mlp, 8 * dims.hidden_size)
    return Term("one layer's activations", f"{per_token:,} bytes × {tokens:,} tokens", per_token * tokens)


def _scoring_logits(config: Config, dims: ModelDims, size: int) -> Term:
    columns = Widths.of(dims, config.annotator.tensor_model_parallel_size).vocabulary
    rows = min(config.training.logits_chunk_tokens, config.annotator.pack_length)
    return Term("logits", f"{size} bytes × {rows:,} tokens × {columns:,} columns", size * rows * columns)


def _evaluation_logits(config: Config, dims: ModelDims, size: int, device: Device) -> list[Term]:
    """Of the responses' share of a pack, taken to be that of the longest responses."""
    columns = Widths.of(dims, config.annotator.tensor_model_parallel_size).vocabulary
    longest = config.rollout.max_new_tokens
    share = longest / (longest + config.prompts.max_prompt_tokens)
    rows = min(config.training.logits_chunk_tokens, round(share * config.annotator.pack_length))
    at_a_time = min(KL_TOKENS[device], rows)
    both = f"2 models × {size} bytes × {rows:,} tokens × {columns:,} columns"
    return [
        Term("logits", both, 2 * size * rows * columns),
        Term("their KL", f"7 × 4 bytes × {at_a_time:,} tokens × {columns:,} columns", 7 * 4 * at_a_time * columns),
    ]


def rollout_memory(
    config: Config, dims: ModelDims, device: Device, refreshed: bool = True, responses: int | None = None
) -> RoleMemory:
    """One sidecar's process on a CPU; the least a rank of its engine needs on a GPU, where vLLM gives its key-value
    cache whatever is left of `rollout.gpu_memory_utilization`.

    Args:
        refreshed: False: the teacher's, which never takes another version.
        responses: the most it has to sample from one version; None: not known.
    """
    rollout, size = config.rollout, element_bytes(config)
    tensor = rollout.tensor_model_parallel_size
    parameters = stage_parameters(dims, tensor)
    weights = f"{size} bytes × {parameters:,} parameters"
    terms = [*_process(device, ROLLOUT, size), Term("parameters", weights, size * parameters)]
    most = rollout.max_num_seqs or SEQUENCES
    sequences = most if responses is None else min(most, responses)
    if device == "cpu":
        cache = f"rollout.kv_cache_gib = {rollout.kv_cache_gib:g}"
        terms.append(Term("key-value cache", cache, rollout.kv_cache_gib * 2**30))
        if refreshed:
            terms.append(Term("version that is staged", weights, size * parameters))
        if size < 4:
            formula = f"{KERNELS_OF_A_BATCH_SIZE_BYTES / MIB} MiB × {sequences} batch sizes, measured"
            terms.append(Term("kernels of batch sizes", formula, KERNELS_OF_A_BATCH_SIZE_BYTES * sequences))
    else:
        per_token = 2 * size * dims.num_layers * Widths.of(dims, tensor).key
        longest = config.longest_sequence
        formula = f"{per_token:,} bytes × {longest:,} tokens of one sequence; vLLM takes what is left for more"
        terms.append(Term("key-value cache", formula, per_token * longest))
    tokens = min(BATCHED_TOKENS, sequences * config.prompts.max_prompt_tokens)
    terms.append(_forward_activations(dims, tensor, size, tokens))
    logits = f"2 × 4 bytes × {sequences} sequences × {dims.vocab_size:,} tokens"
    terms.append(Term("logits", logits, 2 * 4 * sequences * dims.vocab_size))
    return RoleMemory(ROLLOUT if refreshed else ROLLOUT_TEACHER, device, terms)
