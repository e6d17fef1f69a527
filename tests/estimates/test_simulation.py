"""The time estimate: the simulation against closed forms, the steps against the trainer's own, rates of a real run."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from equal_rates import rates

from megatron_npd.buffer.plan import make_plan
from megatron_npd.config import Config
from megatron_npd.errors import UserError
from megatron_npd.estimates.division import Sizes, best_division, divisions
from megatron_npd.estimates.rates import (
    read_rates,
)
from megatron_npd.estimates.simulation import Timeline, Workers, simulate
from megatron_npd.estimates.workload import StageWork, Workload, packs_of_steps, workload
from megatron_npd.models.cost import CostModel
from megatron_npd.process.metrics import Metrics
from megatron_npd.roles import ANNOTATOR, ROLLOUT, TRAINER
from megatron_npd.schema import TEACHER_VERSION
from megatron_npd.training.schedule import plan_steps


def work(units: int = 6, steps: int = 4, packs: int = 8, rounds: int = 2, heldout_tokens: float = 0.0) -> Workload:
    """One held-out unit, then rounds; every response has 10 tokens, a unit 10 responses, a prefill 1 token each."""
    heldout = StageWork("heldout", TEACHER_VERSION, [1], 0.0, [])
    stages = [
        StageWork(f"round_{index:04d}", index, [10] * units, 1.0, [packs] * steps, steps, index + 1)
        for index in range(rounds)
    ]
    return Workload([heldout, *stages], rounds, frozenset(range(rounds + 1)), 10.0, heldout_tokens, 100, packs)


def test_training_alone_takes_the_sum_of_its_steps() -> None:
    timeline = simulate(work(steps=4, packs=8), rates(trainer=100.0), Workers())
    assert timeline.seconds == pytest.approx(2 * 4 * 8)  # 2 rounds of 4 steps of 8 packs of 100 tokens
    assert timeline.idle_share(TRAINER) == pytest.approx(0.0)
    assert timeline.idle_share(ROLLOUT) == pytest.approx(1.0)


def test_replicas_share_the_packs_of_a_step() -> None:
    timeline = simulate(work(steps=4, packs=8), rates(trainer=100.0), Workers(replicas=3))
    assert timeline.seconds == pytest.approx(2 * 4 * 3), "of 8 packs, 3 replicas have 3, 3 and 2"


def test_what_every_step_and_publication_costs_is_added() -> None:
    slow = rates(trainer=100.0)
    trainer = slow.trainer.model_copy(
        update={"step_seconds": 0.5, "publish_stall_seconds": 2.0, "publish_seconds": 3.0, "checkpoint_seconds": 1.0}
    )
    timeline = simulate(work(steps=4, packs=8), slow.model_copy(update={"trainer": trainer}), Workers())
    # Version 0, then each round: the steps, the publication, the checkpoint, which its writing runs beside.
    assert timeline.seconds == pytest.approx(3.0 + 2 * (4 * 8.5 + 2.0 + 1.0))


def test_sidecars_and_annotators_are_a_pipeline() -> None:
    """A unit takes 1 s to sample and 2 s to annotate: the slower one sets the pace, the faster adds its first unit."""
    timeline = simulate(work(units=6, rounds=1), rates(rollout=100.0, annotator=5.0), Workers())
    assert timeline.seconds == pytest.approx(0.1 + 1 + 6 * 2)  # the held-out response first
    assert timeline.busy(ROLLOUT) == pytest.approx(0.1 + 6 * 1)
    assert timeline.busy(ANNOTATOR) == pytest.approx(6 * 2)


def test_given_responses_take_no_time_to_sample_but_are_annotated() -> None:
    """Of 6 units 4 are given: 2 seconds to sample the others, 2 to annotate each."""
    given = replace(work(units=6, rounds=1), stages=[])
    for stage in work(units=6, rounds=1).stages:
        given.stages.append(replace(stage, given_units=4) if stage.units[0] > 1 else stage)
    timeline = simulate(given, rates(rollout=100.0, annotator=5.0), Workers())
    assert timeline.busy(ROLLOUT) == pytest.approx(0.1 + 2 * 1)
    assert timeline.busy(ANNOTATOR) == pytest.approx(6 * 2)


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_a_run_without_rounds_is_simulated(source: str) -> None:
    config = Config.model_validate(
        {
            "run_directory": "-",
            "models": {"teacher": "-", "student": "-"},
            "prompts": {"train": "-", "heldout": "-"},
            "rounds": {"count": 0},
            "warmup": {"source": source, "samples_per_prompt": 1},
            "rollout": {"samples_per_unit": 10},
            "annotator": {"pack_length": 4096},
        }
    )
    equal = rates(rollout=100.0)
    plan = make_plan(config, 100, 10)
    simulated = workload(config, plan, equal)
    assert [stage.name for stage in simulated.stages] == ["heldout", "warmup"] and simulated.final_version == 1
    assert simulated.stages[1].given_units == (10 if source == "data" else 0)
    timeline = simulate(simulated, equal, Workers(sidecars=0, teacher_sidecars=1))
    sampled = 10 + (100 if source == "teacher" else 0)
    assert timeline.busy(ROLLOUT) == pytest.approx(sampled * equal.samples.response_tokens / 100.0, rel=1e-3)


def test_more_sidecars_divide_the_units() -> None:
    timeline = simulate(work(units=6, rounds=1), rates(rollout=100.0), Workers(sidecars=4))
    assert timeline.seconds == pytest.approx(2.0), "one begins with the held-out response; the others have 2 units each"
    assert timeline.busy(ROLLOUT) == pytest.approx((0.1 + 6) / 4)


def test_annotators_evaluate_when_there_is_nothing_to_annotate() -> None:
    timeline = simulate(work(units=1, rounds=1, heldout_tokens=7.0), rates(annotator=1.0), Workers())
    assert timeline.seconds == pytest.approx(10 + 3 * 7), "two versions, and once the teacher"
    alone = simulate(work(units=1, rounds=1, heldout_tokens=7.0), rates(annotator=1.0), Workers(annotators=2))
    assert alone.seconds == pytest.approx(10 + 2 * 7), "version 0 beside the round, each with its own teacher's pass"


def test_a_round_waits_for_its_version_and_the_trainer_for_its_samples() -> None:
    timeline = simulate(work(units=1, steps=1, packs=1), rates(rollout=10.0, trainer=10.0), Workers())
    spans = [(span.role, span.what, round(span.begin, 3), round(span.end, 3)) for span in timeline.spans]
    assert [span for span in spans if span[3] > span[2]] == [
        (ROLLOUT, "heldout", 0.0, 1.0),
        (ROLLOUT, "round_0000", 1.0, 11.0),
        (TRAINER, "round_0000", 11.0, 21.0),
        (ROLLOUT, "round_0001", 21.0, 31.0),
        (TRAINER, "round_0001", 31.0, 41.0),
    ]


def test_publishing_early_lets_the_roles_overlap() -> None:
    once = work(units=1, steps=10, packs=1)
    stages = [once.stages[0], *(replace(stage, publish_after=5) for stage in once.stages[1:])]
    early = simulate(replace(once, stages=stages), rates(rollout=2.0, trainer=10.0), Workers())
    late = simulate(once, rates(rollout=2.0, trainer=10.0), Workers())
    assert late.seconds - early.seconds == pytest.approx(50.0), "the second half of round 0 runs beside round 1's units"


def test_with_turns_all_work_adds_up() -> None:
    slow = rates(rollout=100.0, annotator=5.0, trainer=100.0)
    timeline = simulate(work(heldout_tokens=3.0), slow, Workers(turns=True, sidecars=2))
    assert timeline.seconds == pytest.approx(_everything(timeline))
    spans = sorted((span.begin, span.end) for span in timeline.spans if span.end > span.begin)
    assert all(end <= begin + 1e-9 for (_, end), (begin, _) in itertools.pairwise(spans))


def test_with_turns_each_starts_when_there_is_something_to_do() -> None:
    """The teacher's sidecar; the annotator at the first unit, the trainer at the first samples, the student's sidecar
    when the version it samples from is there."""
    base = rates(rollout=100.0, annotator=5.0, trainer=100.0)
    names = ("trainer", "annotator", "rollout", "rollout_teacher")
    slow = base.model_copy(
        update={name: getattr(base, name).model_copy(update={"start_seconds": 1.0}) for name in names}
    )
    warmup = StageWork("warmup", TEACHER_VERSION, [10, 10], 1.0, [1], 1, 1)
    whole = replace(work(units=2, rounds=2), final_version=2)
    stages = [whole.stages[0], warmup, replace(whole.stages[1], version=1, publishes=2)]
    timeline = simulate(replace(whole, stages=stages), slow, Workers(turns=True, teacher_sidecars=1))
    starts = {(span.role, span.worker): span.begin for span in timeline.spans if span.what == "start"}
    ends = {span.what: span.end for span in timeline.spans if span.what == "warmup" and span.role == TRAINER}
    first_unit = min(s.end for s in timeline.spans if s.what == "warmup" and s.role == ROLLOUT)
    first_samples = min(s.end for s in timeline.spans if s.what == "warmup" and s.role == ANNOTATOR)
    assert starts == {
        (ROLLOUT, 1): 0.0,
        (ANNOTATOR, 0): pytest.approx(first_unit),
        (TRAINER, 0): pytest.approx(first_samples),
        (ROLLOUT, 0): pytest.approx(ends["warmup"]),
    }


def _everything(timeline: Timeline) -> float:
    return sum(timeline.busy(role) * timeline.workers[role] for role in timeline.workers)


def test_starts_run_side_by_side_and_a_teachers_sidecar_ends_with_it() -> None:
    base = rates(rollout=100.0)
    starts = {"launch": 5.0, "trainer": 10.0, "annotator": 20.0, "rollout": 7.0, "rollout_teacher": 3.0}
    timed = base.model_copy(
        update={
            name: getattr(base, name).model_copy(update={"start_seconds": seconds}) for name, seconds in starts.items()
        }
    )
    together = simulate(work(units=1, rounds=1), timed, Workers())
    assert together.seconds == pytest.approx(5 + 20), "the annotator is the last to start"
    apart = simulate(work(units=1, rounds=1), timed, Workers(teacher_sidecars=1))
    begins = {(span.worker, span.what): span.begin for span in apart.spans if span.role == ROLLOUT}
    assert begins[1, "start"] == 5.0
    assert begins[0, "start"] == 15.0, "version 0 is there when the trainer has started"
    assert together.workers[ROLLOUT] == 1 and apart.workers[ROLLOUT] == 2


@pytest.mark.parametrize(("stage", "samples"), [("warmup", 371), ("round_0000", 160)])
def test_steps_are_those_the_trainer_plans(stage: str, samples: int, config: Config) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 120, samples)
    training = config.training
    steps = plan_steps(
        config.seed,
        stage,
        np.stack([np.arange(samples), np.zeros(samples, np.int64)], axis=1),
        lengths,
        epochs=config.warmup.epochs if stage == "warmup" else config.rounds.epochs_per_round,
        capacity=training.sequence_length,
        global_batch_size=training.global_batch_size,
        cost=CostModel(1.0, 0.0),
    )
    estimated = packs_of_steps(config, stage, float(lengths.sum()))
    assert len(estimated) == len(steps)
    assert sum(estimated) == pytest.approx(sum(len(step.packs) for step in steps), rel=0.03)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "run_directory": str(tmp_path),
            "models": {"teacher": "t", "student": "s"},
            "prompts": {"train": "a", "heldout": "b", "max_prompt_tokens": 64},
            "rollout": {"max_new_tokens": 64, "samples_per_unit": 48},
            "annotator": {"pack_length": 512},
            "warmup": {"samples_per_prompt": 1, "epochs": 3},
            "rounds": {"count": 2, "epochs_per_round": 2, "publish_at": 0.5},
            "training": {"sequence_length": 1024, "global_batch_size": 4, "data_parallel_size": 2},
        }
    )


def test_the_work_is_that_of_the_plan(config: Config) -> None:
    planned = workload(config, make_plan(config, 100, 20), rates())
    heldout, warmup, first, last = planned.stages
    assert (heldout.units, heldout.packs_of_steps) == ([20], [])
    assert (warmup.units, warmup.publishes, warmup.publish_after) == ([48, 48, 4], 1, len(warmup.packs_of_steps))
    assert warmup.prefilled_tokens == 50.0
    assert first.prefilled_tokens == 50 + 2 * 10, "the teacher with the prompt, both models without"
    assert (first.version, first.publishes, first.publish_after) == (1, 2, math.ceil(len(first.packs_of_steps) / 2))
    assert (last.publishes, last.publish_after) == (3, len(last.packs_of_steps))
    assert planned.heldout_tokens == 20 * 50


def test_a_starving_trainer_is_given_sidecars(config: Config) -> None:
    """Sampling is the bottleneck: the best division puts most GPUs there, and is no slower than any other."""
    planned = work(units=64, steps=4, packs=8)
    slow = rates(rollout=10.0, annotator=1000.0, trainer=1000.0)
    best = best_division(planned, slow, Sizes(1, 1, 1), 16)
    assert best is not None
    assert best.workers.sidecars >= 11
    tried = [simulate(planned, slow, workers).seconds for workers in divisions(planned, Sizes(1, 1, 1), 16)]
    assert best.timeline.seconds <= 1.01 * min(tried)


def test_divisions_fit_and_divide_the_batch() -> None:
    sizes = Sizes(replica=4, annotator=2, sidecar=1)
    found = list(divisions(work(units=40, packs=6), sizes, 32))
    assert {workers.replicas for workers in found} == {1, 2, 3, 6}
    assert all(sizes.gpus(workers) <= 32 for workers in found)
    assert best_division(work(), rates(), sizes, 6) is None, "a trainer, an annotator and a sidecar need 7"


def test_rates_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "rates.toml"
    file.write_text(rates(1.0, 2.0, 3.0).to_toml())
    assert read_rates(file) == rates(1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tokens_per_second = 3.0", "tokens_per_second = 0.0", "trainer.tokens_per_second = 0.0: input should be gr"),
        ("tokens_per_second = 3.0", "token_rate = 3.0", "trainer.tokens_per_second: field required"),
        ("kept_share = 0.5", "kept_share = 1.5", "samples.kept_share = 1.5: input should be less than or equal to 1"),
        ("[launch]", "[launch", "not valid TOML"),
    ],
)
def test_bad_rates_are_one_line(old: str, new: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "rates.toml"
    text = rates(1.0, 2.0, 3.0).to_toml()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=words.replace("[", r"\[")) as error:
        read_rates(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def measured(run: Path, *without: tuple[str, str], kept: int = 5) -> None:
    """A run directory with one record of each kind that rates come from, but for some (role, event)."""
    config = Config.model_validate(
        {
            "run_directory": str(run),
            "models": {"teacher": "t", "student": "s"},
            "prompts": {"train": "a", "heldout": "b", "max_prompt_tokens": 64},
            "rollout": {"max_new_tokens": 64},
        }
    )
    sampled = {"stage": "round_0000", "samples": 10, "prompt_tokens": 400, "response_tokens": 100, "seconds": 2.0}
    step = {"stage": "round_0000", "step": 1, "seconds": 4.0, "perf/tokens": 1000, "buffer/packing_efficiency": 0.25}
    started = {"import_seconds": 3.0, "seconds": 4.0}
    records = {
        ("supervisor", "start"): started,
        ("trainer", "start"): started,
        ("trainer", "step"): step,
        ("trainer", "publish"): {"seconds": 2.0, "stall_seconds": 0.5},
        ("trainer", "checkpoint"): {"seconds": 1.5},
        ("annotator", "start"): started,
        ("annotator", "refresh"): {"seconds": 0.5},
        ("annotator", "unit"): {"stage": "round_0000", "samples": 10, "kept": kept, "tokens": 900, "seconds": 3.0},
        ("rollout", "start"): started,
        ("rollout", "unit"): sampled,
        ("rollout_teacher", "start"): started,
        ("rollout_teacher", "unit"): sampled | {"stage": "heldout"},
    }
    run.mkdir()
    (run / "config.toml").write_text(config.to_toml())
    for (role, event), values in records.items():
        if (role, event) not in without:
            Metrics(run / "metrics" / f"{role}.jsonl", role).log(event, **values)


def test_given_responses_that_were_left_out_lengthen_no_sample(tmp_path: Path) -> None:
    """Of 10 given ones that were kept the trainer took 5, beside the student's own 5."""
    measured(tmp_path / "run")
    given = {"stage": "round_0000", "samples": 10, "kept": 10, "given": True, "tokens": 300, "seconds": 1.0}
    Metrics(tmp_path / "run" / "metrics" / "annotator.jsonl", "annotator").log("unit", **given)
    Metrics(tmp_path / "run" / "metrics" / "trainer.jsonl", "trainer").log("stage", stage="round_0000", samples=10)
    found = read_rates(tmp_path / "run")
    assert found.samples.kept_tokens == 1000 * 0.25 / 5 / 10, "one of five epochs, over what was trained on"
    assert found.samples.kept_share == 0.5, "of the student's own"


def test_rates_of_a_run_are_its_means(tmp_path: Path) -> None:
    measured(tmp_path / "run")
    found = read_rates(tmp_path / "run")
    assert (found.samples.prompt_tokens, found.samples.response_tokens, found.samples.kept_share) == (40.0, 10.0, 0.5)
    assert found.samples.kept_tokens == 1000 * 0.25 / 5 / 5, "one of five epochs, over the kept samples"
    assert (found.trainer.tokens_per_second, found.trainer.start_seconds) == (250.0, 7.0)
    assert (found.annotator.tokens_per_second, found.annotator.load_seconds) == (300.0, 0.5)
    assert (found.rollout.tokens_per_second, found.rollout_teacher.tokens_per_second) == (50.0, 50.0)
    assert (found.launch.start_seconds, found.trainer.publish_stall_seconds) == (3.0, 0.5)


@pytest.mark.parametrize(
    ("role", "event"),
    [("trainer", "step"), ("trainer", "publish"), ("annotator", "unit"), ("rollout", "unit"), ("rollout", "start")],
)
def test_a_run_that_did_not_get_far_enough_is_refused(role: str, event: str, tmp_path: Path) -> None:
    measured(tmp_path / "run", (role, event))
    with pytest.raises(UserError, match=rf"/run: no {event} of the {role} was measured; must be a run that trained"):
        read_rates(tmp_path / "run")


def test_a_run_whose_rounds_are_not_annotated_is_refused(tmp_path: Path) -> None:
    measured(tmp_path / "run", ("annotator", "unit"))
    warmup = {"stage": "warmup", "samples": 10, "kept": 9, "tokens": 500, "seconds": 1.0}
    Metrics(tmp_path / "run" / "metrics" / "annotator.jsonl", "annotator").log("unit", **warmup)
    with pytest.raises(UserError, match="/run: no unit of a round of the annotator was measured"):
        read_rates(tmp_path / "run")


def test_a_run_that_kept_nothing_is_refused(tmp_path: Path) -> None:
    measured(tmp_path / "run", kept=0)
    with pytest.raises(UserError, match=r"/run: kept_share = 0\.0: input should be greater than 0"):
        read_rates(tmp_path / "run")


def test_no_rates_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the rates"):
        read_rates(tmp_path / "nothing.toml")
    with pytest.raises(UserError, match=r"no config.toml in it"):
        read_rates(tmp_path)
