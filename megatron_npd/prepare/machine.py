"""Whether this one machine can hold the roles of a run: `npd run` and `npd check` say in one line what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_npd.config import Config
from megatron_npd.errors import UserError
from megatron_npd.estimates.text import names_slurm, role_memories, size_text
from megatron_npd.hardware import device, host
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.process.waiting import takes_turns
from megatron_npd.roles import ANNOTATOR, SIDECAR, TRAINER

CERTAIN_SHARE = 0.8
"""Of an estimated need, what a machine must have at least: the estimates are within 10 % of what is measured on a CPU
(`tests/estimates/test_memory_estimate.py`), of shapes that were measured."""
CACHE_BLOCK = 128
"""Tokens of a block of vLLM's key-value cache on a CPU."""


@dataclass(frozen=True)
class Need:
    """Memory the roles take together, each at its fullest, beside what this machine has. Bytes."""

    together: float
    largest: float
    """Of the role that takes the most, all its processes, which work at the same time."""
    largest_role: str
    memory: host.Memory

    @property
    def is_short(self) -> bool:
        """Whether the roles may not have enough, once all are at their fullest."""
        return self.together > self.memory.available

    def __str__(self) -> str:
        has = f"{size_text(self.memory.available)} of this machine's {size_text(self.memory.total)} are free"
        if not self.is_short:
            return f"all roles together take up to {size_text(self.together)} of memory; {has}"
        return (
            f"memory may not be enough: all roles together take up to {size_text(self.together)}, and {has}; the "
            "kernel may end one of them (`npd check` says what takes how much)"
        )


def check_machine(config: Config, teacher: ModelDims, student: ModelDims) -> Need | None:
    """What the roles need of this machine's memory; None where they compute on GPUs, whose memory is another matter.

    Raises:
        UserError: vLLM is missing or not built for this machine, its cache on a CPU has no room for a sequence, or one
            role alone takes more memory than there is.
    """
    device.require_vllm_fits(gpu=device.has_gpu())
    if device.device_here() == "gpu":
        return None
    _check_cache(config, "teacher", teacher)
    _check_cache(config, "student", student)
    need = _need(config, teacher, student, host.memory())
    if CERTAIN_SHARE * need.largest > need.memory.total + need.memory.swap:
        swap = f" and {size_text(need.memory.swap)} of swap" if need.memory.swap else ""
        raise UserError(
            f"memory of this machine = {size_text(need.memory.total)}{swap}: must hold the {need.largest_role} of this "
            f"run, which takes {size_text(need.largest)} by itself"
        )
    return need


def machine_lines(config: Config, teacher: ModelDims, student: ModelDims) -> Iterator[str]:
    """What `npd check` says of this machine, or of the nodes where `[slurm]` says that the roles work elsewhere.

    Raises:
        UserError: see `check_machine`.
    """
    slurm = config.slurm
    if names_slurm(config):
        if slurm.gpus_per_node and (unfit := device.gpu_obstacle()):
            yield f"note: slurm.gpus_per_node = {slurm.gpus_per_node}: {unfit}"
        return
    need, unused = check_machine(config, teacher, student), device.unused_gpus()
    if unused:
        yield unused
    if need:
        yield str(need)


def least_cache_bytes(config: Config, dims: ModelDims) -> int:
    """Key-value cache of an engine on a CPU, bytes of a rank, below which vLLM has no room for a longest sequence."""
    rollout, size = config.rollout, 4 if config.models.dtype == "float32" else 2
    heads = max(1, dims.num_kv_heads // rollout.tensor_model_parallel_size)
    blocks = -(-_longest(config, dims) // CACHE_BLOCK) + 1  # vLLM keeps one to itself
    return blocks * CACHE_BLOCK * 2 * size * dims.num_layers * heads * dims.head_dim


def _longest(config: Config, dims: ModelDims) -> int:
    """Tokens of the longest sequence that an engine is started for."""
    return min(config.longest_sequence + 1, dims.max_positions)


def _check_cache(config: Config, name: str, dims: ModelDims) -> None:
    """Refuse a cache that vLLM would refuse, once it has read the model."""
    gib, least = config.rollout.kv_cache_gib, least_cache_bytes(config, dims)
    if int(gib * 2**30) < least:
        raise UserError(
            f"rollout.kv_cache_gib = {gib}: must hold one sequence of {_longest(config, dims)} tokens of the {name}, "
            f"which takes {least / 2**30:.3g}"
        )


def _need(config: Config, teacher: ModelDims, student: ModelDims, memory: host.Memory) -> Need:
    taken = dict(_of_roles(config, teacher, student))
    largest = max(taken, key=lambda role: taken[role])
    sidecars = [taken[role] for role in SIDECAR.values() if role in taken]
    # In turns the student's sidecar starts when the teacher's has left (`roles.Work.wants_student`).
    left = min(sidecars) if takes_turns(config) and len(sidecars) > 1 else 0.0
    return Need(sum(taken.values()) - left, taken[largest], largest, memory)


def _of_roles(config: Config, teacher: ModelDims, student: ModelDims) -> Iterator[tuple[str, float]]:
    """(role, bytes of all its processes on this machine)"""
    ranks = {TRAINER: config.training.world_size, ANNOTATOR: config.annotator.tensor_model_parallel_size}
    for one in role_memories(config, teacher, student, "cpu"):
        yield one.role, one.bytes * ranks.get(one.role, config.rollout.tensor_model_parallel_size)
