"""A real Slurm cluster on this one machine, for tests: munged, slurmctld and a slurmd for each of three nodes.

Everything lies in one folder, has ports of its own, listens on 127.0.0.1 alone, and ends with the cluster.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
POLICY = Path("/usr/sbin/policy-rc.d")
"""Debian asks it whether the daemons of a package that is being installed shall start."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
KillWait=5
SlurmctldPort={controller_port}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n[1-3] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Three nodes, n1 to n3, of two processors each, in the partition `debug`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        """For every process that talks to this cluster."""

    def run(self, *command: str) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: status {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of a heterogeneous one's first component."""
        for attempt in range(5):  # the controller may be busy: it was seen to answer nothing, without an error
            command = ["scontrol", "--oneliner", "show", "job", job]
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip():
                break
            time.sleep(0.5 * (attempt + 1))
        assert done.returncode == 0, f"{command}: status {done.returncode}: {done.stdout}{done.stderr}"
        words = done.stdout.splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def steps(self, job: str) -> dict[str, str]:
        """Name of each running step of a job -> its id."""
        listed = self.run("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i %j").splitlines()
        return {name: step for step, name in (line.split() for line in listed)}

    def logs(self) -> str:
        """The end of what the controller and the nodes logged."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("slurm*.log")))


def missing() -> str | None:
    """Why there can be no cluster here, after trying to install what it takes; None: there can."""
    if os.geteuid() != 0:
        return "needs root, as Slurm's daemons do"
    if all(map(shutil.which, PROGRAMS)):
        return None
    if not shutil.which("apt-get"):
        return "Slurm is not installed, and there is no apt-get to install it with"
    install = ["install", "-y", "--no-install-recommends", *PACKAGES]
    with _daemons_stay_off():
        why = _apt_get(*install)
        if why:  # the package lists may be missing or old
            why = _apt_get("update") or _apt_get(*install)
    if why:
        return f"Slurm cannot be installed: {why}"
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    return f"{' and '.join(PACKAGES)} are installed, but lack {lacking[0]}" if lacking else None


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that runs within the block; whatever it started has ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="npd_slurm_", ignore_cleanup_errors=True) as folder:
        yield from _cluster(Path(folder))


def _cluster(folder: Path) -> Iterator[Cluster]:
    folder.chmod(0o711)  # everybody may reach the socket: munged insists
    for name in ("munge", "state"):
        (folder / name).mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    ports = _free_ports()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=socket.gethostname(),
            folder=folder,
            controller_port=ports[0],
            node_ports=",".join(map(str, ports[1:])),
        )
    )
    made = Cluster(folder)
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    with contextlib.ExitStack() as daemons:
        daemons.enter_context(_daemon(made, "munged", "--foreground", f"--socket={folder}/munge/socket", *munge))
        _wait_until(lambda: (folder / "munge" / "socket").exists(), "munged does not start")
        daemons.enter_context(_daemon(made, "slurmctld", "-D"))
        for node in ("n1", "n2", "n3"):
            daemons.enter_context(_daemon(made, "slurmd", "-D", "-N", node))
        _wait_until(lambda: _idle_nodes(made) == 3, f"no three nodes: see {folder}")
        try:
            yield made
        finally:
            for job in made.run("squeue", "--noheader", "--format=%A").split():
                made.run("scancel", "--full", job)
            _wait_until(lambda: not made.run("squeue", "--noheader").strip(), "jobs do not end", 60)


@contextlib.contextmanager
def _daemon(made: Cluster, *command: str) -> Iterator[None]:
    with open(made.folder / f"{command[0]}.out", "ab") as out:
        process = subprocess.Popen(command, env=made.environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle_nodes(made: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%t"],
        env=made.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split().count("idle")


def _free_ports() -> list[int]:
    """Four ports nobody uses."""
    with contextlib.ExitStack() as sockets:
        return [sockets.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(4)]


def _wait_until(condition: Callable[[], object], complaint: str, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, complaint
        time.sleep(0.2)


def _apt_get(*arguments: str) -> str | None:
    """Run apt-get; what it complained of, or None."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            ["apt-get", "-q", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
    except subprocess.TimeoutExpired:
        return "apt-get takes longer than 300 s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]


@contextlib.contextmanager
def _daemons_stay_off() -> Iterator[None]:
    """Installing a package starts no daemon of this machine."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
