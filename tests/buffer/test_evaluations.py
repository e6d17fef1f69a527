"""Who still has to answer what, who is at it, and which version is best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from small_config import make_config

from megatron_npd.buffer.evaluations import (
    Exam,
    best_of,
    best_version,
    is_taken,
    open_exams,
    results_of,
    scores,
    taking,
)
from megatron_npd.buffer.plan import Plan, make_plan
from megatron_npd.config import Config
from megatron_npd.files import write_json
from megatron_npd.roles import ROLLOUT, STUDENT, TEACHER
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import TEACHER_VERSION
from megatron_npd.supervise.policies import next_policy
from megatron_npd.supervise.role_work import Work, roles_of


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Versions 0, 1 and 2, of which the first and the last answer `ends`."""
    asked = [{"task": "exact_match", "name": name, "versions": name} for name in ("ends", "each")]
    return make_config(tmp_path / "run", evaluation=asked, launch={"turns": "on"})


@pytest.fixture
def plan(config: Config) -> Plan:
    return make_plan(config, 4, 2)


@pytest.fixture
def run(config: Config) -> RunDirectory:
    return RunDirectory(Path(config.run_directory))


def answer(run: RunDirectory, name: str, version: int, accuracy: float = 0.5) -> None:
    write_json(run.result(name, version), {"accuracy": accuracy, "version": version})


def sample(run: RunDirectory, plan: Plan, *stages: str) -> None:
    for stage in stages:
        for unit in range(plan.stages[stage].units):
            path = run.unit("rollouts", stage, unit)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def test_what_is_open_is_so_by_version(run: RunDirectory, plan: Plan) -> None:
    assert open_exams(run, plan) == [
        Exam(0, "each"),
        Exam(0, "ends"),
        Exam(1, "each"),
        Exam(2, "each"),
        Exam(2, "ends"),
    ]
    answer(run, "each", 0)
    answer(run, "ends", 2)
    assert open_exams(run, plan) == [Exam(0, "ends"), Exam(1, "each"), Exam(2, "each")]


def test_one_worker_is_at_an_exam_and_none_at_one_that_has_a_result(
    run: RunDirectory, config: Config, plan: Plan
) -> None:
    exam = Exam(1, "each")
    with taking(run, config, exam) as is_ours:
        assert is_ours and is_taken(run, config, exam)
        with taking(run, config, exam) as is_ours_too:
            assert not is_ours_too
    assert not is_taken(run, config, exam)
    answer(run, "each", 1)
    with taking(run, config, exam) as is_ours:
        assert not is_ours


def test_the_sidecar_is_wanted_until_everything_is_answered(run: RunDirectory, config: Config, plan: Plan) -> None:
    work = Work(run, plan)
    (sidecar,) = [role for role in roles_of(config, run, plan, run.root) if role.name == ROLLOUT]
    sample(run, plan, "heldout")
    assert not work.wants_student() and next_policy(run, plan) == STUDENT, "no version is there yet"
    run.version(0).mkdir(parents=True)
    assert work.wants_student() and sidecar.done() == 0
    sample(run, plan, "round_0000", "round_0001")
    assert next_policy(run, plan) == STUDENT and not sidecar.is_done()
    for name, version in (("each", 0), ("ends", 0), ("each", 1)):
        answer(run, name, version)
    assert not work.wants_student(), "the last version is to come"
    run.version(2).mkdir()
    assert work.wants_student()
    before = sidecar.done()
    answer(run, "each", 2)
    answer(run, "ends", 2)
    assert sidecar.is_done() and sidecar.done() == before + 2 and next_policy(run, plan) is None


def test_the_best_version_is_known_once_all_have_their_score(run: RunDirectory, plan: Plan) -> None:
    for version, accuracy in ((0, 0.2), (1, 0.6)):
        answer(run, "each", version, accuracy)
    assert scores(run, "each", [0, 1, 2]) == {0: 0.2, 1: 0.6} and best_version(run, plan, "each") is None
    answer(run, "each", 2, 0.6)
    assert best_version(run, plan, "each") == 2, "of equal ones the later"
    for version, kl in ((0, 0.3), (1, 0.1), (2, 0.2)):
        write_json(run.evaluation(version), {"version": version, "heldout_kl": kl})
    assert best_version(run, plan, "heldout_kl") == 1


def test_a_score_that_is_no_number_is_no_best() -> None:
    assert best_of({0: 0.1, 1: math.nan}, "heldout_kl") == 0
    assert best_of({0: math.nan, 1: math.nan}, "each") == 1


def test_the_teachers_result_stands_beside_those_of_versions(run: RunDirectory) -> None:
    answer(run, "each", 3)
    answer(run, "each", TEACHER_VERSION, 0.9)
    assert run.result("each", TEACHER_VERSION).stem == TEACHER
    (run.results("each") / "notes.json").write_text("mine")
    assert {version: result["accuracy"] for version, result in results_of(run, "each").items()} == {-1: 0.9, 3: 0.5}
