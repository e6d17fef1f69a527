"""The reproduction: its task, its plan, its intervals, its page, and one tiny arm that is run for real."""

from __future__ import annotations

import importlib
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from places import EXAMPLES, ROOT

from megatron_npd.config import Config, load_config

HERE = EXAMPLES / "does_it_pay"
MODULES = ("arms", "chain", "models", "page", "prepare", "run", "statistics_of")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the example by its name; the next test imports it anew."""
    monkeypatch.syspath_prepend(HERE)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def config_of(setting: Any, arm: Any) -> Config:
    """A run's configuration, as `npd run base.toml --set ...` reads it."""
    keys = {"selection.tau": setting.tau, **setting.keys, **arm.keys}
    return load_config(HERE / "base.toml", [f"{key}={json.dumps(value)}" for key, value in keys.items()])


def test_chains(example: Any) -> None:
    chain = example("chain")
    assert [chain.applied(7, word) for word in ("+3", "-9", "*10")] == [10, 18, 10]
    for made in chain.make_chains(1, 200):
        start, *operations = made.question.split()
        assert chain.SHORTEST <= len(operations) <= chain.LONGEST and len(set(operations)) == len(operations)
        number, words = int(start), made.answer.split()
        assert words[::2] == operations, "every operation is copied"
        for operation, after in zip(operations, words[1::2], strict=True):
            number = eval(f"{number} {operation[0]} {operation[1:]}") % 20
            assert number == int(after)
    assert chain.make_chains(1, 5) == chain.make_chains(1, 5) != chain.make_chains(2, 5)
    asked = {made.question for made in chain.make_chains(3, 50)}
    assert asked.isdisjoint(made.question for made in chain.make_chains(3, 50, but=asked))


def test_corrupted_answers_go_on_from_a_wrong_number(example: Any) -> None:
    chain = example("chain")
    generator, chains = random.Random(0), chain.make_chains(4, 300)
    wrong = numbers = 0
    for made in chains:
        number, words = int(made.question.split()[0]), chain.corrupted(made, generator, 0.1).split()
        for operation, after in zip(words[::2], words[1::2], strict=True):
            wrong += int(after) != chain.applied(number, operation)
            numbers, number = numbers + 1, int(after)
    assert 0.08 < wrong / numbers < 0.12
    assert all(chain.corrupted(made, generator, 0.0) == made.answer for made in chains)


def test_intervals(example: Any) -> None:
    """Values of textbooks: Student's t for 4 values, and Wilson's example of 81 of 263."""
    statistics_of = example("statistics_of")
    mean = statistics_of.mean_of([1.0, 2.0, 3.0, 4.0])
    assert (mean.value, mean.count) == (2.5, 4)
    assert mean.half_width == pytest.approx(3.182 * 1.2909944 / 2, rel=1e-6)
    assert str(statistics_of.mean_of([3.0])) == "3.0"
    assert statistics_of.wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert statistics_of.wilson(0, 500)[0] == pytest.approx(0.0, abs=1e-9)
    difference = statistics_of.paired({1: 5.0, 2: 7.0, 3: 9.0}, {2: 6.0, 3: 6.0, 4: 0.0})
    assert (difference.value, difference.count, difference.signed()) == (2.0, 2, "+2.0 ± 12.7")
    assert statistics_of.paired({1: 5.0}, {2: 5.0}) is None


def test_the_plan(example: Any) -> None:
    """Every arm's configuration is valid, and all arms of a setting see as many samples in as many passes."""
    arms, prepare = example("arms"), example("prepare")
    assert not set(prepare.SETS) ^ {number for setting, _ in arms.PLAN for number in setting.sets}
    names = [setting.name for setting, _ in arms.PLAN]
    assert len(set(names)) == len(names)
    for setting, its_arms in arms.PLAN:
        assert setting.teacher in prepare.TEACHERS and setting.warmed_as in ("", *names)
        for arm in its_arms:
            config = config_of(setting, arm)
            copies = 1 if arm.prompts == "train" else prepare.COPIES
            size = config.rounds.prompts_per_round or arms.PROMPTS
            seen = config.rounds.count * config.rounds.epochs_per_round * size
            if config.rounds.count == 0:
                seen = config.warmup.epochs * copies * arms.PROMPTS
            assert seen == arms.EPOCHS * arms.PROMPTS, arm.name
            assert arm.refreshes == (config.rounds.count - 1 if config.rounds.count else None)
    wanted = {"sft", "kd", "refresh_0", "refresh_1", "refresh_3", "refresh_10", "strict", "filter", "random"}
    assert {arm.name for arm in arms.ARMS} == wanted | {"refresh_21", "varied", "corrupted"}
    assert all(arm.sets >= 6 for arm in arms.ARMS if arm.name != "strict"), "at least six prompt sets"
    assert load_config(HERE / "base.toml").rollout.samples_per_unit == arms.PROMPTS


def test_the_parts_of_the_plan(example: Any, tmp_path: Path) -> None:
    arms, run = example("arms"), example("run")
    jobs = run.jobs_of(arms.PLAN)
    assert len({job.name for job in jobs}) == len(jobs)
    quick = {job.name for job in run.jobs_of(arms.QUICK)}
    assert quick < {job.name for job in jobs}, "what --quick has run is not run again"
    assert {job.arm.name for job in run.jobs_of(arms.QUICK)} == {"warm", "sft", "refresh_1", "refresh_10"}
    warmups = [job for job in jobs if job.arm is arms.WARM]
    assert all(run.warmup_of(job) in warmups for job in jobs), "what a run starts from is in the plan"
    job = jobs[1]
    assert run.expected_seconds(job, tmp_path) == job.arm.seconds
    job.result(tmp_path).parent.mkdir(parents=True)
    job.result(tmp_path).write_text(json.dumps({"wall_seconds": 77.0}))
    assert run.expected_seconds(job, tmp_path) == 77.0


def test_what_runs_side_by_side(example: Any) -> None:
    """As many at once as was asked for; after one that failed no other begins, and its last words are the exit's."""
    arms, run = example("arms"), example("run")
    jobs = [job for job in run.jobs_of(arms.PLAN) if job.setting.at_once == 2][:12]
    begun: list[str] = []
    under_way, peaks, lock = set(), [], threading.Lock()

    class Naps:
        def run(self, job: Any) -> None:
            with lock:
                begun.append(job.name)
                under_way.add(job.name)
                peaks.append(len(under_way))
            time.sleep(0.05)
            with lock:
                under_way.remove(job.name)
            if job is jobs[3]:
                raise run.RunError(f"{job.name}: bad")

    with run.tqdm(total=len(jobs)) as bar, pytest.raises(SystemExit, match=f"^{jobs[3].name}: bad$"):
        run.run_all(Naps(), jobs, 2, bar)
    assert set(begun[:4]) == {job.name for job in jobs[:4]} and max(peaks) == 2
    assert not under_way and len(begun) < 10


def write_results(arms: ModuleType, folder: Path) -> None:
    """Results of the whole plan: near-policy above fine-tuning, and a filter that makes no difference."""
    accuracy = {
        "warm": 5, "sft": 200, "kd": 220, "refresh_0": 180, "refresh_1": 260, "refresh_3": 340, "refresh_10": 420,
        "refresh_21": 420, "strict": 430, "filter": 340, "random": 340, "varied": 300, "corrupted": 300,
    }  # fmt: skip
    for setting, its_arms in arms.PLAN:
        for arm in [arms.WARM, *its_arms]:
            for place, number in enumerate(setting.sets[: arm.sets]):
                noise = (-1) ** place * (7 if arm.name in ("filter", "random") else 3)
                result = {
                    "setting": setting.name, "arm": arm.name, "prompt_set": number, "date": "2026-11-27",
                    "machine": "2 cores", "correct": accuracy[arm.name] + noise + number, "problems": 500,
                    "heldout_kl": 0.1, "generated_tokens": 1000, "annotated_tokens": 2000, "trained_tokens": 3000,
                    "device_seconds": {"rollout": 100.0 if arm.name == "strict" else 1.0, "annotator": 1.0,
                                       "trainer": 20.0}, "kept_share": [0.8, 0.9],
                }  # fmt: skip
                path = folder / setting.name / arm.name / f"set_{number:02d}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result))


@pytest.mark.heavy
def test_the_page(example: Any, tmp_path: Path) -> None:
    arms, page = example("arms"), example("page")
    write_results(arms, tmp_path)
    results = page.read(tmp_path)
    table, html = page.markdown(results), page.page(results)
    # refresh_3 and sft have the same noise, so that their difference is exact: 140 of 500.
    assert "| near-policy against fine-tuning (refresh_3 − sft) | +28.0 ± 0.0 |" in table
    assert "opposite sign" in table and "not seen" in table, "refresh_0 is below kd, and the filter is noise"
    assert "In none of them was it seen to help" in table
    assert "tried under 4 conditions" in table
    assert "refresh_10 reaches 97.7 % of its accuracy with 18.2 % of its device-seconds" in table
    assert html.count("<svg") == 1
    assert not re.findall(r"(?:src|href)=\"(?!#)|<script|@import|url\((?!#)", html), "nothing is fetched"
    assert page.on_frontier({"a": (1.0, 50.0), "b": (2.0, 40.0), "c": (3.0, 60.0)}) == ["a", "c"]
    single = page.in_words({1: {"correct": 81, "problems": 263}})
    assert single == "30.8 (25.5 to 36.6)"


@pytest.mark.heavy
def test_a_page_of_nothing_yet(example: Any, tmp_path: Path) -> None:
    page = example("page")
    assert "Nothing was run yet" in page.markdown(page.read(tmp_path))
    assert "<svg" in page.page(page.read(tmp_path))


@pytest.mark.slow
def test_one_arm_for_real(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up and two rounds through `npd run`, tiny: the result, its answers in transformers, and no second run."""
    arms, prepare, run = example("arms"), example("prepare"), example("run")
    for name, value in {"PROMPTS": 24, "PROBLEMS": 20, "HELDOUT": 4, "UNASKED_ROWS": 2}.items():
        monkeypatch.setattr(prepare, name, value)
    monkeypatch.setattr(prepare, "TEACHERS", {"teacher": ("--steps", "2")})
    setting = arms.Setting("tiny", "two rounds", warmup_epochs=1, sets=(3,))
    arm = arms.Arm("refresh_1", "two rounds", {"rounds.count": 2, "rounds.epochs_per_round": 1})
    monkeypatch.setattr(arms, "PLAN", [(setting, [arm])])
    runner = run.Runner(tmp_path / "work", tmp_path / "results", keep=True)
    job = run.Job(setting, arm, 3)
    runner.run(job)

    result = json.loads(job.result(tmp_path / "results").read_text())
    warm = json.loads(run.warmup_of(job).result(tmp_path / "results").read_text())
    assert (result["setting"], result["arm"], result["prompt_set"], result["problems"]) == ("tiny", "refresh_1", 3, 20)
    assert result["optimizer_steps"] == 2 and len(result["kept_share"]) == 2
    assert 0 < result["generated_tokens"] <= 2 * 24 * 24 and result["trained_tokens"] > 0
    assert all(seconds > 0 for seconds in result["device_seconds"].values())
    assert warm["generated_tokens"] == 0 and warm["kept_share"] == [] and warm["heldout_kl"] > result["heldout_kl"] - 1

    folder = tmp_path / "work" / "runs" / job.name
    (answers,) = (folder / "evaluation" / "chains").glob("*.jsonl")
    command = [sys.executable, str(HERE / "check_answers.py"), str(folder / "student_hf"), str(answers)]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "0 answers differ" in checked.stdout

    # Stopped between a warm-up and its result: the student is there, and its result is written all the same.
    run.warmup_of(job).result(tmp_path / "results").unlink()
    runner.run(run.warmup_of(job))
    again = json.loads(run.warmup_of(job).result(tmp_path / "results").read_text())
    assert {**again, "wall_seconds": warm["wall_seconds"]} == warm

    monkeypatch.setattr(run.subprocess, "run", None)
    runner.run(job)
