"""Optimizer state as tensors shaped and named like the parameters they belong to, whichever optimizer holds it.

A checkpoint holds, for every parameter, `exp_avg` and `exp_avg_sq` and, where the model computes in 16 bit, the float32
`main` weights. So a run can go on at another tensor, pipeline or data parallel size, with or without the distributed
optimizer, and with torch's, Transformer Engine's or apex's Adam. (The distributed optimizer's own formats of
megatron-core 0.16 lose the step count of torch's Adam, and none can be read without it.)

Where the distributed optimizer splits the state over the data-parallel ranks, each rank writes the elements that it
holds, as blocks of those tensors, and reads no others. Nothing is sent between ranks and nothing is copied before the
checkpoint's writer does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_npd.mcore.flat_blocks import stored_blocks
from megatron_npd.mcore.optimizer import Trainable

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

    @property
    def first(self) -> int:
        """The parameter's first element that this rank holds."""
        return 0 if self.bounds is None else self.bounds[0]


def sharded_for_saving(trainable: Trainable, model_state: dict[str, Any]) -> dict[str, ShardedTensor]:
    """The state that this rank is to write, sharing memory with the optimizer's; every rank calls this.

    `model_state`: the model's sharded state dict, whose data are the parameters themselves.
    """
    if not (_is_split(trainable) or trainable.parallel.is_first_replica):
        return {}  # another rank holds, and writes, the same
    return _sharded(trainable, model_state, _held)


def sharded_for_loading(trainable: Trainable, model_state: dict[str, Any]) -> dict[str, ShardedTensor]:
    """The state that this rank holds, to be loaded in place; moments the optimizer does not have yet are made."""
    return _sharded(trainable, model_state, _held_or_made)


def set_steps(trainable: Trainable, steps: int) -> None:
    """Tell the optimizer how many steps its moments have seen."""
    for slot in _slots(trainable).values():
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


def _sharded(
    trainable: Trainable, model_state: dict[str, Any], tensor: Callable[[Slot, str], torch.Tensor]
) -> dict[str, ShardedTensor]:
    slots, found = _slots(trainable), {}
    for number, (parameter, described) in enumerate(_described(trainable, model_state)):
        if parameter not in slots:
            continue  # another data-parallel rank's
        slot = slots[parameter]
        states = {name: tensor(slot, name).detach().view(-1) for name in _names(trainable)}
        bounds = slot.bounds or (0, parameter.numel())
        for index, place in enumerate(stored_blocks(described, parameter.shape, *bounds)):
            for name, state in states.items():
                key = f"optimizer.{name}.{place.described.key}"
                block = place.holding(state, slot.first, key)
                found[f"{name}.{number}.{index}"] = _of_no_replica(block) if _is_split(trainable) else block
    return found


def _held(slot: Slot, name: str) -> torch.Tensor:
    return slot.main if name == MAIN else slot.adam.state[slot.main][name]


def _held_or_made(slot: Slot, name: str) -> torch.Tensor:
    if name != MAIN and name not in slot.adam.state[slot.main]:
        slot.adam.state[slot.main][name] = torch.zeros_like(slot.main, dtype=torch.float32)
    return _held(slot, name)


def _of_no_replica(block: ShardedTensor) -> ShardedTensor:
    """The ranks of which one is told by the last part of a replica's number hold different elements."""
    return replace(block, replica_id=(*block.replica_id[:-1], 0))


def _is_split(trainable: Trainable) -> bool:
    return trainable.chunks[0].ddp_config.use_distributed_optimizer


def _described(trainable: Trainable, model_state: dict[str, Any]) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """(parameter, the sharded tensor or factory that describes it), in the order of `_parameters`."""
    by_parameter = {entry.data: entry for entry in nested_values(model_state) if isinstance(entry.data, torch.Tensor)}
    for parameter in _parameters(trainable):
        yield parameter, by_parameter[parameter]


def _parameters(trainable: Trainable) -> Iterator[torch.nn.Parameter]:
    """This rank's parameters, in an order that all data-parallel ranks share."""
    for model in trainable.models:
        yield from model.parameters()


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
