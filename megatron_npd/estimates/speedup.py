"""What a schedule costs beside another one: strictly on-policy against near-policy, from published device-hours.

A cost in device-hours has four parts. How each depends on the schedule (the published hours are those of arXiv
2605.05940; the rest are this model's assumptions):

* rollout: proportional to the responses that are sampled, and to what a token costs when so many are sampled at once;
* annotation: proportional to the responses that are sampled;
* training: the same number of passes over as many responses whatever the schedule; dearer by `padding` without packing;
* other: the same.

What a sampled token costs. A decoding step reads the weights once and the keys and values of every running sequence
once; on the machines in question that, not arithmetic, is what takes time (Pope et al., arXiv 2211.05102, section 2;
measured up to the largest batches that fit by Recasens et al., arXiv 2503.08311). So in bytes, with n sequences
running, a step takes  weights * (1 + overhead) + n * kv * context.  A batch whose responses must all be there before
anything goes on takes as many steps as its longest response: its end decodes few sequences at the price of a whole
read of the weights. Divided by its tokens:

    cost of a token = weights * (1 + overhead) * steps / tokens + kv * context

which needs no bandwidth, for only ratios are asked for. A large batch keeps every slot of the engine full and hides the
longest response; a batch of one optimizer step does not.

Legend: L lengths 0 .. limit - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from megatron_npd.estimates.rates import (
    AnnotatorRates,
    LaunchRates,
    Rates,
    RolloutRates,
    SampleRates,
    TrainerRates,
)
from megatron_npd.estimates.simulation import Workers, simulate
from megatron_npd.estimates.workload import StageWork, Workload
from megatron_npd.run_directory import HELDOUT_STAGE, round_stage
from megatron_npd.schema import TEACHER_VERSION

HOUR = 3600.0


@dataclass(frozen=True)
class DeviceHours:
    """Of a whole run."""

    rollout: float
    annotation: float
    training: float
    other: float

    @property
    def total(self) -> float:
        return self.rollout + self.annotation + self.training + self.other


PUBLISHED = DeviceHours(rollout=300.0, annotation=18.0, training=42.0, other=6.0)
"""openPangu 7B -> 1B on 8 devices (arXiv 2605.05940): 2 sets of responses, 5 epochs on each."""
PUBLISHED_SETS, PUBLISHED_EPOCHS = 2, 10
PUBLISHED_SPEEDUP = 8.1
"""Over an on-policy baseline, as published."""
DEVICES = 8


@dataclass(frozen=True)
class Lengths:
    """Response lengths, log-normal, cut by a limit; tokens."""

    median: float
    sigma: float
    """Standard deviation of the logarithm."""
    limit: int

    @cached_property
    def longer_L(self) -> np.ndarray:
        """Probability that a response is longer than l, for l = 0 .. limit - 1."""
        lengths = np.arange(1, self.limit)
        z = (np.log(lengths) - math.log(self.median)) / (self.sigma * math.sqrt(2.0))
        return np.concatenate([[1.0], 0.5 * np.array([math.erfc(value) for value in z])])

    @cached_property
    def mean(self) -> float:
        return float(self.longer_L.sum())

    @cached_property
    def mean_context(self) -> float:
        """Response tokens before the one that is sampled, on average over all that are."""
        twice = (2 * np.arange(self.limit) + 1) @ self.longer_L
        return float(twice / (2 * self.mean))

    def longest(self, responses: float) -> float:
        """Of so many, expected."""
        return float((1.0 - (1.0 - self.longer_L) ** responses).sum())


@dataclass(frozen=True)
class Engine:
    """What decodes, on one device. The defaults are openPangu-Embedded-1B in bfloat16 (26 layers, hidden
    1536, intermediate 6144, 12 heads, 6 of keys and values, vocabulary 153,376, tied)."""

    weights: float = 2.31e9
    """Bytes."""
    kv: float = 2 * 6 * 128 * 26 * 2.0
    """Bytes of a token's keys and values."""
    slots: int = 256
    """Sequences decoded at once, at most."""
    overhead: float = 0.0
    """What a step takes beside reading, as a share of reading the weights: launches, scheduling, sampling."""

    def token_cost(self, lengths: Lengths, prompt: float, responses: float, devices: int) -> float:
        """Bytes a sampled token, where so many responses over all devices are waited for."""
        each = max(responses / devices, 1.0)
        steps = lengths.longest(responses) + max(each - self.slots, 0.0) * lengths.mean / self.slots
        a_step = self.weights * (1.0 + self.overhead)
        return a_step * steps / (each * lengths.mean) + self.kv * (prompt + lengths.mean_context)


@dataclass(frozen=True)
class Setting:
    """What is not published, and what it is taken to be."""

    lengths: Lengths
    prompt: float = 200.0
    """Mean tokens of a prompt."""
    responses: float = 100_000.0
    """Of one set: what a near-policy round samples at once."""
    padding: float = 1.0
    """What training without packing costs against packed."""
    engine: Engine = field(default_factory=Engine)
    devices: int = DEVICES

    def token_cost(self, responses: float) -> float:
        """Bytes a sampled token, where so many are waited for."""
        return self.engine.token_cost(self.lengths, self.prompt, responses, self.devices)

    def batch(self, tokens: float) -> float:
        """Responses of an optimizer step of so many tokens."""
        return max(tokens / (self.lengths.mean + self.prompt), float(self.devices))


def scheduled(sets: float, sampled_at_once: float, setting: Setting, packed: bool = True) -> DeviceHours:
    """What a run costs that samples `sets` whole sets of responses in all, so many at once, for the published epochs.

    `sets` = 10 is a fresh response for every one that is trained on, 2 is what was published.
    """
    slower = setting.token_cost(sampled_at_once) / setting.token_cost(setting.responses)
    more = sets / PUBLISHED_SETS
    return DeviceHours(
        rollout=PUBLISHED.rollout * more * slower,
        annotation=PUBLISHED.annotation * more,
        training=PUBLISHED.training * (1.0 if packed else setting.padding),
        other=PUBLISHED.other,
    )


def strict(batch: float, setting: Setting) -> DeviceHours:
    """Strictly on-policy: every optimizer step samples its own `batch` responses, and nothing is packed."""
    return scheduled(PUBLISHED_EPOCHS, batch, setting, packed=False)


def speedup(batch: float, setting: Setting) -> float:
    """Of the published schedule over strictly on-policy training in steps of `batch` responses."""
    return strict(batch, setting).total / PUBLISHED.total


def batch_of(wanted: float, setting: Setting) -> float | None:
    """Responses of an optimizer step at which the speed-up is `wanted`; None: at none of `devices` .. `responses`."""
    low, high = float(setting.devices), setting.responses
    if not speedup(high, setting) <= wanted <= speedup(low, setting):
        return None
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if speedup(middle, setting) > wanted else (low, middle)
    return math.sqrt(low * high)


def simulated_hours(cost: DeviceHours, rounds: int, epochs: int, steps_an_epoch: int, devices: int = DEVICES) -> float:
    """Hours by the clock that the simulation of the roles says, all devices working on whatever is to be done.

    `cost` is of the whole run: `rounds` rounds of `epochs` epochs of so many steps.
    """
    steps = rounds * epochs * steps_an_epoch
    stages = [StageWork(HELDOUT_STAGE, TEACHER_VERSION, [0], 0.0, [])]
    for index in range(rounds):
        packs = [1] * (epochs * steps_an_epoch)
        stages.append(StageWork(round_stage(index), index, [1], 1.0, packs, len(packs), index + 1))
    rates = _rates(
        seconds_a_round=cost.rollout * HOUR / devices / rounds,
        annotating=cost.annotation * HOUR / devices / rounds,
        a_step=(cost.training + cost.other) * HOUR / devices / steps,
    )
    work = Workload(stages, rounds, frozenset(range(rounds + 1)), 1.0, 0.0, tokens_per_pack=1, packs_at_once=1)
    return simulate(work, rates, Workers(turns=True)).seconds / HOUR


def _rates(seconds_a_round: float, annotating: float, a_step: float) -> Rates:
    """Rates at which a round's one unit of one response, of one token, takes so long, and a step of one pack."""
    rollout = RolloutRates(start_seconds=0.0, tokens_per_second=1.0 / seconds_a_round)
    return Rates(
        samples=SampleRates(prompt_tokens=1.0, response_tokens=1.0, kept_share=1.0, kept_tokens=1.0),
        launch=LaunchRates(start_seconds=0.0),
        trainer=TrainerRates(start_seconds=0.0, tokens_per_second=1.0 / a_step),
        annotator=AnnotatorRates(start_seconds=0.0, tokens_per_second=1.0 / annotating),
        rollout=rollout,
        rollout_teacher=rollout,
    )
