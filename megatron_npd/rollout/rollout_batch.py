"""What an engine works on: whole units, begun while it has room and finished one by one.

The engine stays full across units: while the last responses of one run to the length limit, those of the next are
sampled beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_npd.buffer.shards import Shard, concatenate_ragged
from megatron_npd.buffer.work import WorkUnit
from megatron_npd.schema import ROLLOUT_COLUMNS
from megatron_npd.vllm_engine.engine import Request, Response, RolloutEngine


@dataclass
class _UnitInProgress:
    unit: WorkUnit
    requests: list[Request]
    responses: dict[int, Response] = field(default_factory=dict)
    """By place in the unit."""


class RolloutBatch:
    """The units an engine works on.

    Args:
        requests_of: a unit's requests, in its order of identities.
        one_by_one: begin a unit only when the one before is finished. A response's last bits depend on what else is in
            the batch, unless the engine's kernels are batch-invariant; so they depend on its unit alone.
    """

    def __init__(
        self, engine: RolloutEngine, requests_of: Callable[[WorkUnit], list[Request]], one_by_one: bool = False
    ):
        self._engine, self._requests_of, self._one_by_one = engine, requests_of, one_by_one
        self._units: list[_UnitInProgress] = []
        self._places: dict[int, tuple[_UnitInProgress, int]] = {}  # by ticket: whose response, and which

    @property
    def units(self) -> list[WorkUnit]:
        """Begun and not finished, in the order they were begun."""
        return [one.unit for one in self._units]

    @property
    def has_room(self) -> bool:
        """Whether the engine could work on more than it has."""
        return not self._units or (not self._one_by_one and self._engine.running < self._engine.max_num_seqs)

    def __str__(self) -> str:
        """For people: the only unit, or the first of several."""
        several = f"{len(self._units)} units at once, first " if len(self._units) > 1 else ""
        return several + str(self._units[0].unit)

    def begin(self, unit: WorkUnit) -> None:
        """Sample a unit's responses from the next step on."""
        one = _UnitInProgress(unit, self._requests_of(unit))
        self._units.append(one)
        for place, request in enumerate(one.requests):
            self._places[self._engine.begin(request)] = one, place

    def step(self) -> list[tuple[WorkUnit, Shard]]:
        """One step of the engine, and the units that are finished with it, as `rollouts` shards.

        Raises:
            RolloutError: the engine failed.
        """
        for ticket, response in self._engine.step():
            one, place = self._places.pop(ticket)
            one.responses[place] = response
        finished = [one for one in self._units if len(one.responses) == len(one.requests)]
        self._units = [one for one in self._units if len(one.responses) < len(one.requests)]
        return [(one.unit, _shard(one)) for one in finished]


def _shard(done: _UnitInProgress) -> Shard:
    """A unit's responses as a `rollouts` shard (`schema.ROLLOUT_COLUMNS`)."""
    stage, number = done.unit
    rows, requests = stage.rows(number), done.requests
    responses = [done.responses[place] for place in range(len(requests))]
    prompt_ids, prompt_offsets = concatenate_ragged([np.array(request.prompt_ids) for request in requests], "int32")
    response_ids, response_offsets = concatenate_ragged([np.array(response.ids) for response in responses], "int32")
    logprobs, _ = concatenate_ragged([np.array(response.logprobs) for response in responses], "float32")
    columns = {
        "prompt_index": stage.prompt_index[rows],
        "sample_index": stage.sample_index[rows],
        "seed": [request.seed for request in requests],
        "policy_version": [response.version for response in responses],
        "finish_reason": [response.finish_reason for response in responses],
        "prompt_ids": prompt_ids,
        "prompt_offsets": prompt_offsets,
        "response_ids": response_ids,
        "response_offsets": response_offsets,
        "behaviour_logprobs": logprobs,
    }
    typed = {name: np.asarray(column, dtype=ROLLOUT_COLUMNS[name][0]) for name, column in columns.items()}
    return Shard("rollouts", typed, {"stage": stage.name, "unit": number})
