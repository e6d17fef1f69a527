"""Starting torch.distributed and Megatron's model parallelism, and describing it as a `Parallel`."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.distributed.rendezvous import leave_meeting_place, meeting_place
from megatron_npd.mcore import cpu


def initialize(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int = 1,
    seed: int = 1234,
    timeout: timedelta = timedelta(minutes=30),
    deterministic: bool = False,
) -> Parallel:
    """Join the other ranks (RANK and WORLD_SIZE from the environment; alone without) and lay out the groups.

    `deterministic`: on GPUs torch takes kernels that sum in a fixed order, and raises where there is none. The rest of
    it is in the environment (`supervise.role_work`).

    Raises:
        ValueError: WORLD_SIZE is not a multiple of tensor × pipeline × context parallel size.
    """
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tp, pp, cp = tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size
    virtual = virtual_pipeline_model_parallel_size
    if world_size % (tp * pp * cp):
        raise ValueError(f"WORLD_SIZE = {world_size}: must be a multiple of TP × PP × CP = {tp} × {pp} × {cp}")
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank % torch.cuda.device_count()))}"
        torch.cuda.set_device(device)
        _choose_kernels(deterministic)
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            **meeting_place(rank, world_size, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        leave_meeting_place(rank)
    parallel_state.initialize_model_parallel(tp, pp, virtual if virtual > 1 else None, context_parallel_size=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    dp = parallel_state.get_data_parallel_world_size()
    return Parallel(
        rank=rank,
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        virtual_pp_size=virtual,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=dp,
        tp_group=parallel_state.get_tensor_model_parallel_group() if tp > 1 else None,
        cp_group=parallel_state.get_context_parallel_group() if cp > 1 else None,
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True) if dp * cp > 1 else None,
        device=device,
    )


def _choose_kernels(deterministic: bool) -> None:
    """With `warn_only`, flash attention's backward would only warn, and go on summing in any order
    (torch's attention_backward.cu)."""
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # NaN in all memory that is taken: for debugging


def leave_layout() -> None:
    """Leave the model-parallel groups, so that the same processes can `initialize` another layout."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """Leave all groups; safe to call when nothing was started."""
    leave_layout()
    if dist.is_initialized():
        dist.destroy_process_group()
