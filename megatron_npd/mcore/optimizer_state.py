"""Optimizer state as full tensors shaped like the parameters they belong to, whichever optimizer holds it.

A checkpoint holds, for every parameter, `exp_avg` and `exp_avg_sq` and, where the model computes in 16 bit, the float32
`main` weights: sharded exactly as the parameter itself. So a run can go on at another tensor, pipeline or data
parallel size, with or without the distributed optimizer, and with torch's, Transformer Engine's or apex's Adam. (The
distributed optimizer's own formats of megatron-core 0.16 lose the step count of torch's Adam, and none can be read
without it.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_npd.mcore.optimizer import Trainable, sum_over

MAIN = "main"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slot:
    """Where the state of one parameter lies on this rank."""

    main: torch.Tensor
    """What Adam updates: the parameter itself, its float32 copy, or this rank's flat part of either."""
    adam: torch.optim.Optimizer
    bounds: tuple[int, int] | None
    """Elements of the flattened parameter this rank holds; None: all of them."""


def sharded_for_saving(trainable: Trainable, model_state: dict[str, Any]) -> dict[str, Any]:
    """The state as sharded tensors; every rank calls this, the replicas of a shard return nothing for it.

    `model_state`: the model's sharded state dict, whose data are the parameters themselves.
    """
    slots, saved = _slots(trainable), {}
    for number, (parameter, described) in enumerate(_described(trainable, model_state)):
        for name in _names(trainable):
            full = _full_tensor(parameter, slots.get(parameter), name, trainable)
            if full is not None:
                saved[f"{name}.{number}"] = _with_data(described, name, full)
    return saved


def sharded_for_loading(trainable: Trainable, model_state: dict[str, Any]) -> dict[str, Any]:
    """The same with empty tensors in host memory, to load into."""
    return {
        f"{name}.{number}": _with_data(described, name, torch.empty(parameter.shape, device="cpu"))
        for number, (parameter, described) in enumerate(_described(trainable, model_state))
        for name in _names(trainable)
    }


@torch.no_grad()
def restore(trainable: Trainable, loaded: dict[str, torch.Tensor], steps: int) -> None:
    """Put loaded tensors where the optimizer keeps them. `steps`: optimizer steps done when they were saved."""
    slots = _slots(trainable)
    for number, parameter in enumerate(_parameters(trainable)):
        slot = slots.get(parameter)
        if slot is None:
            continue  # another data-parallel rank's
        for name in _names(trainable):
            full = loaded[f"{name}.{number}"]
            part = full if slot.bounds is None else full.flatten()[slice(*slot.bounds)]
            if name == MAIN:
                slot.main.copy_(part)
            else:
                slot.adam.state[slot.main][name] = part.to(slot.main.device, torch.float32, copy=True)
        _set_steps(slot, steps)


def _set_steps(slot: Slot, steps: int) -> None:
    """torch's Adam counts steps for each parameter, the fused ones for each group."""
    if isinstance(slot.adam, torch.optim.AdamW):
        slot.adam.state[slot.main]["step"] = torch.tensor(float(steps))
    else:
        for group in slot.adam.param_groups:
            group["step"] = steps


def _names(trainable: Trainable) -> tuple[str, ...]:
    sixteen_bit = trainable.models[0].config.params_dtype != torch.float32
    return (MAIN, *MOMENTS) if sixteen_bit else MOMENTS


def _full_tensor(parameter: torch.Tensor, slot: Slot | None, name: str, trainable: Trainable) -> torch.Tensor | None:
    """One state of one parameter, float32 in its shape; None on the replicas of the rank that writes it.

    A state split over the data-parallel ranks is put together by adding its disjoint parts as bit patterns.
    """
    split = trainable.chunks[0].ddp_config.use_distributed_optimizer
    held = None if slot is None else (slot.main if name == MAIN else slot.adam.state[slot.main][name])
    if not split:
        return held.detach() if trainable.parallel.is_first_replica else None
    full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if slot is not None:
        full[slice(*slot.bounds)] = held
    sum_over(trainable.parallel.dp_cp_group, full.view(torch.int32))
    return full.view(parameter.shape).cpu() if trainable.parallel.is_first_replica else None


def _described(trainable: Trainable, model_state: dict[str, Any]) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """(parameter, the sharded tensor or factory that describes it), in the order of `_parameters`."""
    by_parameter = {entry.data: entry for entry in nested_values(model_state) if isinstance(entry.data, torch.Tensor)}
    for parameter in _parameters(trainable):
        yield parameter, by_parameter[parameter]


def _parameters(trainable: Trainable) -> Iterator[torch.nn.Parameter]:
    """This rank's parameters, in an order that all data-parallel ranks share."""
    for model in trainable.models:
        yield from model.parameters()


def _with_data(described: Any, name: str, data: torch.Tensor) -> Any:
    """`described` for another tensor of the same shape and sharding, under a key of its own."""
    changes = {"key": f"optimizer.{name}.{described.key}", "data": data}
    if hasattr(described, "dtype"):
        changes["dtype"] = data.dtype
    return replace(described, **changes)


def _slots(trainable: Trainable) -> dict[torch.nn.Parameter, Slot]:
    """Model parameter -> its slot, for every parameter of which this rank holds state."""
    slots = {}
    for optimizer in _inner_optimizers(trainable.optimizer):
        adam = optimizer.optimizer
        if isinstance(optimizer, DistributedOptimizer):
            for parameter, (group, place) in optimizer.model_param_group_index_map.items():
                held = optimizer._get_model_param_range_map(parameter)["param"]
                slots[parameter] = Slot(adam.param_groups[group]["params"][place], adam, (held.start, held.end))
        elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
            for parameters, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
                slots |= {p: Slot(main, adam, None) for p, main in zip(parameters, mains, strict=True)}
        else:
            slots |= {p: Slot(p, adam, None) for group in adam.param_groups for p in group["params"]}
    return slots


def _inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
