"""A whole run through real sbatch and srun on three nodes: a step is killed, the job requeued, a node lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scaled_examples
import slurm_cluster
from finished_run import check_finished
from inputs import Inputs
from npd_runs import assert_same_versions, npd, train_again
from slurm_cluster import Cluster

from megatron_npd.process.metrics import read_metrics
from megatron_npd.run_directory import RunDirectory
from megatron_npd.versions.manifest import published_versions

pytestmark = pytest.mark.slow
JOB_SECONDS = 480.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if why := slurm_cluster.missing():
        pytest.skip(f"no Slurm here: {why}")
    with slurm_cluster.cluster() as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", made.environment["SLURM_CONF"])
        yield made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The first example scaled down: the trainer on node 0, an annotator and a sidecar on 1, a second sidecar on 2."""
    inputs = scaled_examples.scaled_down("openpangu_7b_to_1b", tmp_path_factory.mktemp("slurm_run"))
    inputs.set("launch", {"turns": "on"})  # three nodes, but one machine
    inputs.set(
        "slurm",
        {
            "gpus_per_node": 0,
            "processes_per_node": 2,
            "sidecars": 2,
            "memory_per_node": "",
            "time_limit": "30",
            "checkpoint_seconds": 61,
            "setup": [f"PATH={Path(sys.executable).parent}:$PATH"],
        },
    )
    return inputs


class Job:
    """A submitted job and its run directory, watched."""

    def __init__(self, cluster: Cluster, number: str, inputs: Inputs):
        self.cluster, self.number, self.run = cluster, number, RunDirectory(inputs.run)
        self._log = inputs.root / f"{inputs.run.name}-{number}.log"
        self._until = time.monotonic() + JOB_SECONDS

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        while not condition():
            if time.monotonic() > self._until or self.state in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                pytest.fail(
                    f"{what}: waited in vain; the job is {self.state}:\n{self.said[-8000:]}\n"
                    f"{self.cluster.run('scontrol', 'show', 'job', self.number)}\n{self.cluster.logs()}"
                )
            time.sleep(0.1)

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def units(self, stage: str) -> int:
        return len(list((self.run.root / "rollouts" / stage).glob("unit_*.safetensors")))

    def steps_trained(self, stage: str) -> int:
        folder = self.run.metrics("trainer").parent
        records = read_metrics(folder) if folder.is_dir() else []
        return sum(record["event"] == "step" and record["stage"] == stage for record in records)


def submit(inputs: Inputs, *options: str) -> list[str]:
    """`npd slurm --submit` in the inputs' folder; the jobs' numbers."""
    before = os.getcwd()
    os.chdir(inputs.root)
    try:
        said = npd("slurm", inputs.path, "--submit", *options).splitlines()
        return [line.split()[-1] for line in said if line.startswith("submitted job")]
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def finished(cluster: Cluster, inputs: Inputs) -> Job:
    """A run that lost a sidecar's step, then was stopped and requeued, then lost a node; and was finished."""
    job = Job(cluster, submit(inputs)[0], inputs)
    job.wait_until(lambda: job.units("round_0000") >= 1, "the first unit of round 0")
    cluster.run("scancel", cluster.steps(job.number)["rollout.node1"])
    job.wait_until(lambda: job.steps_trained("round_0000") >= 2, "two steps of round 0")
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)  # as Slurm does when the time limit is near
    job.wait_until(lambda: job.cluster.job(job.number)["Restarts"] == "1" and job.state == "PENDING", "the requeue")
    time.sleep(3)  # started in the second its credential was revoked, it would be refused by its nodes
    cluster.run("scontrol", "update", f"JobId={job.number}", "StartTime=now")
    job.wait_until(lambda: "rollout.node2" in cluster.steps(job.number), "the second start")
    cluster.run("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=test")
    job.wait_until(lambda: job.state == "COMPLETED", "the end")
    return job


def test_the_run_is_finished_all_the_same(finished: Job) -> None:
    check_finished(finished.run.root)
    assert finished.units("round_0001") == 6


def test_what_happened_is_told(finished: Job) -> None:
    said = finished.said
    assert "rollout.node1 stopped because of SIGKILL" in said
    assert "starting rollout.node1 again" in said
    assert "SIGUSR1: the time limit is near" in said
    assert "rollout.node2 is given up, its node is no longer part of this job" in said
    assert said.rstrip().endswith(str(finished.run.report))


def test_every_rank_has_a_log(finished: Job) -> None:
    logs = {path.name for path in (finished.run.root / "logs").iterdir()}
    ranks = {"trainer.rank0", "trainer.rank1", "annotator.node1.rank0", "rollout.node1.rank0", "rollout.node2.rank0"}
    assert {f"{rank}.log" for rank in ranks} <= logs
    assert "round_0001 step" in (finished.run.root / "logs" / "trainer.rank0.log").read_text()


def test_nothing_is_left_over(finished: Job) -> None:
    assert not list((finished.run.root / "rendezvous").iterdir())
    folder = str(finished.run.root).encode()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if folder in command]


def test_the_weights_are_those_of_an_undisturbed_run_of_the_same_buffer(finished: Job, tmp_path: Path) -> None:
    copy = train_again(finished.run, tmp_path / "run")
    assert published_versions(finished.run) == published_versions(copy) == [0, 1, 2]
    assert_same_versions(finished.run, copy)


MEET = """
import os, sys
import torch
import torch.distributed as dist
from megatron_npd.config import load_config
from megatron_npd.slurm.task import task_environment
from megatron_npd.mcore.model_parallel import initialize, shutdown

os.environ.update(task_environment(load_config(sys.argv[1]), "trainer", "none", os.environ))
parallel = initialize()
total = torch.tensor([float(parallel.rank + 1)])
dist.all_reduce(total)
print("rank", parallel.rank, "on", os.environ["SLURMD_NODENAME"], "sum", total.item(), os.environ["NPD_ADDRESS"])
shutdown()
"""


def test_ranks_on_two_nodes_meet(cluster: Cluster, inputs: Inputs, tmp_path: Path) -> None:
    program = tmp_path / "meet.py"
    program.write_text(MEET)
    inputs.set("slurm.network_interface", "lo")
    command = ["srun", "--nodes=2", "--ntasks=2", sys.executable, str(program), str(inputs.path)]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 on n1 sum 3.0 127.0.0.1", "rank 1 on n2 sum 3.0 127.0.0.1"]


def test_a_heterogeneous_job_and_the_one_that_depends_on_it(cluster: Cluster, inputs: Inputs, finished: Job) -> None:
    """What is left to do is one evaluation: of the first job's components only the annotator's starts a step."""
    last = finished.run.evaluation(max(published_versions(finished.run)))
    figures = last.read_bytes()
    last.unlink()
    shape = ["heterogeneous=true", "partition=debug", "continue_by=dependency", "jobs=2", "sidecars=1"]
    numbers = submit(inputs, *(word for option in shape for word in ("--set", f"slurm.{option}")))
    first, second = (Job(cluster, number, inputs) for number in numbers)
    second.wait_until(lambda: second.state == "COMPLETED", "the second job")
    assert last.read_bytes() == figures
    assert "starting annotator.node1" in first.said and "starting trainer" not in first.said
    assert "starting" not in second.said, "nothing was left for it"
