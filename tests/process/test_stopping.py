"""A real trainer under a real supervisor: what a killed supervisor leaves, and what a full disk does."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fabricated_buffer import make_buffer
from inputs import Inputs, write_prompts
from supervised import alive, wait_until

from megatron_npd.run_directory import RunDirectory
from megatron_npd.supervise.guardian import MARK, marked
from megatron_npd.supervise.progress import last_record
from megatron_npd.supervise.resume_point import resume_point
from megatron_npd.versions.manifest import published_versions, verify_version

pytestmark = pytest.mark.slow

SUPERVISOR = """
import sys, tempfile
from pathlib import Path
from megatron_npd.supervise.console import Console
from megatron_npd.prepare.prepare import load_run_config
from megatron_npd.roles import TRAINER
from megatron_npd.supervise.role_work import roles_of
from megatron_npd.supervise.supervisor import watch_run
from megatron_npd.run_directory import RunDirectory

config = load_run_config(sys.argv[1])
run = RunDirectory(Path(config.run_directory))
with tempfile.TemporaryDirectory() as scratch:
    trainer_alone = lambda plan: [role for role in roles_of(config, run, plan, Path(scratch)) if role.name == TRAINER]
    sys.exit(watch_run(run, config, Console(run.log("supervisor")), trainer_alone))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Everything is annotated: the trainer waits for nobody, and saves after every step."""
    from tiny_models import make_llama
    from tiny_tokenizer import make_tokenizer

    root = tmp_path_factory.mktemp("stopping")
    for seed, name in enumerate(("teacher", "student")):
        make_llama(root / name, seed, num_hidden_layers=2)
        make_tokenizer(root / name)
    inputs = Inputs(root)
    write_prompts(inputs.train, {f"t{i}": f"What is {i} plus {i}?" for i in range(40)})
    inputs.set("rounds", {"count": 1, "epochs_per_round": 4})
    inputs.set("training", {"sequence_length": 128, "global_batch_size": 2, "checkpoint_interval": 1})
    inputs.set("launch", {"longest_restart_delay_seconds": 2.0, "max_restarts": 20})
    return make_buffer(inputs)


def start(run: RunDirectory, before: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
    """A supervisor over the trainer alone."""
    return subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(run.config)], preexec_fn=before)


def steps_saved(run: RunDirectory) -> int:
    """Of the current checkpoint."""
    point = resume_point(run)
    return point.step if point else 0


def descendants(pid: int) -> list[int]:
    """Whatever carries the mark of a supervisor; [] before its first child has one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        environment = b""
        with contextlib.suppress(OSError):  # it has ended meanwhile
            environment = Path(f"/proc/{child}/environ").read_bytes()
        for entry in environment.split(b"\0"):
            if entry.startswith(f"{MARK}=".encode()):
                return marked(entry.decode().partition("=")[2])
    return []


ASKED_TO_STOP = """
import os, signal, sys, time
from megatron_npd.process import stopping

stopping.install()
with stopping.deferred():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    assert stopping.requested() == getattr(signal, sys.argv[1])
    print("noted", flush=True)
try:
    os.kill(os.getpid(), signal.SIGTERM)
finally:
    os.kill(os.getpid(), signal.SIGINT)  # at once: it does not interrupt this block
    print("unwound", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_request_is_noted_or_unwinds(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", ASKED_TO_STOP, name], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "noted\nunwound\n", "")


def test_no_process_and_no_step_is_lost(run: RunDirectory) -> None:
    """Killed while a checkpoint is written; then no file may be large; then there is room again; then it is stopped."""
    supervisor = start(run)
    most: list[int] = []

    def a_checkpoint_is_written() -> bool:
        nonlocal most
        most = max(most, descendants(supervisor.pid), key=len)
        # The trainer, the server of its writers' results, Python's own helper of that, a writer, the writer's child.
        return len(most) >= 5 and resume_point(run) is not None

    wait_until(a_checkpoint_is_written, 300)
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: not any(map(alive, most)), 5)
    saved = resume_point(run)
    assert saved is not None

    full = 100_000  # bytes a file may have: as on a full disk, writing fails in the middle of a file
    supervisor = start(run, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY)))
    log = run.log("supervisor")
    wait_until(lambda: "starting trainer again in 2 s" in log.read_text(), 300)
    assert "trainer could not write or read its files (status 74)" in log.read_text()
    assert "checkpoint could not be written: rank 0: File too large" in log.read_text()
    assert "Traceback" not in run.log("trainer").read_text()
    still = resume_point(run)
    assert still is not None and still.step == saved.step, "what was saved stays"
    resource.prlimit(supervisor.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_until(lambda: steps_saved(run) > saved.step + 2, 300)

    supervisor.send_signal(signal.SIGUSR1)
    assert supervisor.wait(60) == 128 + signal.SIGUSR1
    last = last_record(run.metrics("trainer"), "step")
    assert last is not None and last["step"] == steps_saved(run), "of the very last step"
    assert "did not stop and was killed" not in log.read_text()
    assert start(run).wait(300) == 0
    for version in published_versions(run):
        verify_version(run.version(version))
    assert published_versions(run) == [0, 1] and run.student.is_dir()
    assert not list(run.status_folder.iterdir())


def test_a_full_disk_is_one_line(inputs: Inputs, tmp_path: Path) -> None:
    """A real one, where this user may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a filesystem")
    try:
        inputs.set("run_directory", str(disk / "run"))
        command = [sys.executable, "-m", "megatron_npd.cli", "prepare", str(inputs.path)]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if "its tokenizer" not in line]  # a remark, before
        assert (done.returncode, len(said)) == (74, 1), done.stderr
        assert said[0].startswith("npd: error: ") and str(disk / "run") in said[0]
        assert "No space left on device" in said[0]
        assert time.monotonic() - started < 120
        assert not (disk / "run" / "config.toml").exists()
    finally:
        subprocess.run(["umount", disk], check=True)
