"""What `npd check` says a run will take, in words."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from equal_rates import rates
from inputs import Inputs
from places import TOOLS

from megatron_npd.cli import main
from megatron_npd.config import load_config
from megatron_npd.estimates.text import device_of, workers_of
from megatron_npd.hardware.device import device_here

Check = Callable[..., tuple[int, str]]
PLAN_CLUSTER = TOOLS / "plan_cluster.py"


@pytest.fixture
def check(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run `npd check` with more words; its status and what it says."""

    def run(*words: str) -> tuple[int, str]:
        status = main(["check", str(inputs.path), *words])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_every_term_has_its_formula_and_they_add_up(check: Check, inputs: Inputs) -> None:
    status, said = check()
    assert status == 0
    parts = re.split(r"\n  (?=\w)", said.split("memory of one process of each role on a CPU:")[1].split("\ndisk:")[0])
    assert [part.split()[0] for part in parts[1:]] == ["trainer", "annotator", "rollout_teacher", "rollout"]
    for part in parts[1:]:
        total, *terms = (mebibytes(line) for line in part.splitlines())
        assert sum(terms) == pytest.approx(total, rel=0.1), part  # numbers are rounded
        assert all(len(line.split("   ")[-1]) > 3 for line in part.splitlines()[1:]), "every line ends with a formula"


def mebibytes(line: str) -> float:
    number, unit = re.search(r"([\d.]+) (KiB|MiB|GiB)", line).groups()
    return float(number) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit]


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_a_run_without_rounds_has_no_sidecar_of_the_students(
    check: Check, inputs: Inputs, tmp_path: Path, source: str
) -> None:
    file = tmp_path / "rates.toml"
    file.write_text(rates(rollout=1.0, annotator=100.0, trainer=100.0).to_toml())
    rows = [{"id": f"t{i}", "prompt": f"What is {i}?", "response": "yes"} for i in range(6)]
    inputs.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs.set("rounds.count", 0)
    inputs.set("warmup", {"source": source, "samples_per_prompt": 1})
    status, said = check("--rates", str(file))
    assert status == 0, said
    assert "rollout_teacher  " in said and not re.search(r"\n  rollout  ", said)
    assert "2 versions" in said
    sampled = 3 + (6 if source == "teacher" else 0)
    assert f"2 × 4 bytes × {sampled} sequences" in said, "of the engine, which does not sample what is given"
    inputs.set("slurm", {"gpus_per_node": 8})
    status, said = check("--rates", str(file))
    assert status == 0 and "time, at the rates of" in said, said


def test_without_rates_it_says_how_to_get_the_time(check: Check) -> None:
    _, said = check()
    assert "time: not estimated; --rates takes a file of rates, or the directory of a run" in said
    assert "disk: at most" in said


def test_with_rates_it_says_the_time_of_each_role(check: Check, tmp_path: Path) -> None:
    file = tmp_path / "rates.toml"
    file.write_text(rates(rollout=1.0, annotator=100.0, trainer=100.0).to_toml())
    status, said = check("--rates", str(file))
    assert status == 0
    assert re.search(rf"time, at the rates of {file}: \d", said)
    assert re.search(r"rollout .* busy, idle for \d+%; mean of 2 workers", said)
    assert "division" not in said, "there is nothing to divide on one machine"


def test_it_suggests_a_division_that_does_not_starve(check: Check, inputs: Inputs, tmp_path: Path) -> None:
    """Sampling takes almost all the time, and the configuration gives it one of four devices."""
    inputs.set("slurm", {"gpus_per_node": 4, "sidecars": 1, "annotators": 1})
    inputs.set("training", {"data_parallel_size": 2, "global_batch_size": 2, "sequence_length": 128})
    inputs.set("rollout.samples_per_unit", 1)
    file = tmp_path / "rates.toml"
    file.write_text(rates(rollout=1.0, annotator=1000.0, trainer=1000.0).to_toml())
    status, said = check("--rates", str(file))
    assert status == 0
    suggested = "training.data_parallel_size = 1, slurm.annotators = 1, slurm.sidecars = 2"
    assert re.search(rf"faster, .* on 4 of these 4 devices: {suggested}", said), said
    inputs.set("slurm.sidecars", 2)
    inputs.set("training.data_parallel_size", 1)
    assert "no other division of these 4 devices is faster" in check("--rates", str(file))[1]


def test_what_does_not_fit_on_a_gpu_is_pointed_out(check: Check, inputs: Inputs) -> None:
    inputs.set("slurm", {"gpu_memory_gib": 1e-5})
    assert check()[1].count("MORE THAN slurm.gpu_memory_gib = 1e-05") == 4
    inputs.set("slurm.gpu_memory_gib", 80.0)
    assert "MORE THAN" not in check()[1]


def test_rates_that_are_missing_are_refused(check: Check, tmp_path: Path) -> None:
    status, said = check("--rates", str(tmp_path / "nothing.toml"))
    assert status == 2
    assert said.endswith(f"{tmp_path}/nothing.toml: cannot read the rates: No such file or directory\n")


def test_a_slurm_table_says_what_the_roles_compute_on(inputs: Inputs) -> None:
    assert device_of(inputs.config) == device_here()
    inputs.set("slurm", {"gpus_per_node": 8, "sidecars": 3})
    assert device_of(inputs.config) == "gpu"
    assert (workers_of(inputs.config).sidecars, workers_of(inputs.config).teacher_sidecars) == (3, 0)
    inputs.set("slurm.gpus_per_node", 0)
    assert device_of(inputs.config) == "cpu"


def test_a_runs_own_configuration_is_estimated_like_the_one_it_was_made_from(inputs: Inputs, tmp_path: Path) -> None:
    """It has every default of `[slurm]` written out, which once made a cluster of this machine: no turns, and GPUs."""
    inputs.set("launch", {"turns": "auto"})
    for slurm in (None, {"sidecars": 2}):
        if slurm:
            inputs.set("slurm", slurm)
        (tmp_path / "resolved.toml").write_text(inputs.config.to_toml())
        resolved = load_config(tmp_path / "resolved.toml")
        assert workers_of(resolved) == workers_of(inputs.config)
        assert device_of(resolved) == device_of(inputs.config)
    assert workers_of(resolved).sidecars == 2


def test_a_cluster_is_planned_in_a_table_and_a_plot(plan_cluster: Check, inputs: Inputs, tmp_path: Path) -> None:
    """Sampling is the bottleneck, and there are 12 samples to a round: more than a dozen sidecars do not help."""
    inputs.set("rounds", {"samples_per_prompt": 2})
    inputs.set("rollout.samples_per_unit", 1)
    given, written = tmp_path / "rates.toml", tmp_path / "written.toml"
    given.write_text(rates(rollout=1.0, annotator=1e6, trainer=1e6).to_toml())
    words = ["--rates", given, "--gpus", "4,8,64", "--plot", tmp_path / "plan.png", "--write-rates", written]
    status, said = plan_cluster(*words)
    assert status == 0
    lines = [line.split() for line in said.splitlines()[1:4]]
    assert [int(line[0]) for line in lines] == [4, 8, 64]
    assert [int(line[4]) for line in lines] == [2, 6, 12], "sidecars"
    assert "More than 14 GPUs have nothing to do" in said
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert written.read_text() == given.read_text()


@pytest.mark.parametrize(
    ("gpus", "words"), [("2", "--gpus 2: must be at least 3"), ("many", "--gpus many: must be numbers of GPUs")]
)
def test_a_plan_that_cannot_be_made(gpus: str, words: str, plan_cluster: Check, tmp_path: Path) -> None:
    file = tmp_path / "rates.toml"
    file.write_text(rates().to_toml())
    status, said = plan_cluster("--rates", file, "--gpus", gpus)
    assert (status, said.count("\n")) == (2, 1)
    assert words in said


@pytest.fixture
def plan_cluster(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run tools/plan_cluster.py in this process; its status and what it says."""
    main = runpy.run_path(str(PLAN_CLUSTER))["main"]

    def run(*words: object) -> tuple[int, str]:
        status = main([str(inputs.path), *map(str, words)])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run
