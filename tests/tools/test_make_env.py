"""tools/make_env.sh, with a stand-in for Python whose pip says what it would do: nothing is downloaded."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

pytestmark = pytest.mark.slow  # starts processes

SCRIPT = ROOT / "tools" / "make_env.sh"
PYTHON = r"""#!/usr/bin/env bash
# A Python 3.12 that makes environments of itself, unless the variables below say otherwise.
if [[ $1 == -c ]]; then
    exec "$REAL" -c "import sys; sys.version_info = (3, ${MINOR:-12}, 0, 'final', 0)
${BROKEN:-}
$2" "${@:3}"
elif [[ $1 == -m && $2 == venv ]]; then
    if [[ -n ${VENV_ERROR:-} ]]; then echo "$VENV_ERROR"; exit 1; fi
    mkdir -p "${@: -1}/bin" && touch "${@: -1}/pyvenv.cfg" && cp "$0" "${@: -1}/bin/python"
elif [[ $1 == -m && $2 == pip ]]; then
    echo "${@:3}" >>"$LOG"
    if [[ " $* " == *" --dry-run "* ]]; then
        echo "Collecting torch==2.13.0"
        [[ -z ${TORCH_LINE:-} ]] || { echo "$TORCH_LINE" && exec sleep 60; }
    elif [[ -n ${PIP_ERROR:-} ]]; then
        [[ $3 == --version ]] || { echo "$PIP_ERROR" >&2 && exit 7; }
    elif [[ " $* " == *" -e "* ]]; then
        printf '#!/bin/sh\n' >"$(dirname "$0")/npd" && chmod +x "$(dirname "$0")/npd"
    fi
fi
"""
CUDA_LINE = "  Downloading torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl (526.6 MB)"
CPU_LINE = "Processing /somewhere/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl"


class Machine:
    """Has `python3` and what the script needs, and no other Python."""

    def __init__(self, root: Path):
        self.bin, self.log, self.environment = root / "bin", root / "pip.log", root / "environment"
        self.bin.mkdir()
        for name in ("bash", "cat", "chmod", "cp", "cut", "dirname", "ls", "mkdir", "mktemp", "readlink", "rm"):
            (self.bin / name).symlink_to(shutil.which(name) or name)
        for name in ("env", "sha256sum", "sleep", "touch"):
            (self.bin / name).symlink_to(shutil.which(name) or name)
        self.python = self.bin / "python3"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def make(self, *arguments: Any, **variables: str) -> subprocess.CompletedProcess[str]:
        own = {"PATH": str(self.bin), "LOG": str(self.log), "REAL": sys.executable}
        command = ["bash", str(SCRIPT), *map(str, arguments or [self.environment])]
        return subprocess.run(command, env=own | variables, capture_output=True, text=True, timeout=50)

    def refused(self, *arguments: Any, **variables: str) -> str:
        """What it says where it must refuse: in one line, with status 2."""
        done = self.make(*arguments, **variables)
        assert done.returncode == 2, done.stderr
        [line] = done.stderr.splitlines()
        assert line.startswith("make_env: error: ")
        return line

    @property
    def installations(self) -> list[str]:
        lines = self.log.read_text().splitlines()
        return [line for line in lines if " install " in line and "--dry-run" not in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (CUDA_LINE, r"torch-2\.13\.0-cp312-\S+\.whl, a CUDA build: about 3\.\d GB to download, 6\.\d GB on disk"),
        (CPU_LINE, r"torch-2\.13\.0\+cpu-\S+\.whl, a build for CPUs: up to 0\.\d GB to download, 2\.\d GB on disk"),
        ("", r"which torch pip takes it does not say \(offline\?\); a CUDA build would be about 3\.\d GB"),
    ],
)
def test_what_will_be_downloaded_is_said_first(machine: Machine, line: str, said: str) -> None:
    started = time.monotonic()
    done = machine.make(TORCH_LINE=line)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 40, "the download is waited for"
    before, _, _ = done.stdout.partition("installing torch")
    assert re.search(said, before), before
    assert ("NPD_PIP_ARGS" in before) == (line != CPU_LINE), "how to get the small build"


def test_words_for_pip_go_to_every_installation(machine: Machine) -> None:
    done = machine.make(NPD_PIP_ARGS="--find-links /some/where --pre", TORCH_LINE=CPU_LINE)
    assert done.returncode == 0, done.stderr
    assert len(machine.installations) == 2
    assert all("install --find-links /some/where --pre " in line for line in machine.log.read_text().splitlines()[1:])


def test_made_once(machine: Machine) -> None:
    assert machine.make().returncode == 0
    machine.log.unlink()
    assert "is up to date" in machine.make().stdout and not machine.log.exists()
    assert "is of Python 3.12" not in machine.make(NPD_PYTHON="python3").stderr


@pytest.mark.parametrize("minor", ["10", "14"])
def test_another_python_is_refused(machine: Machine, minor: str) -> None:
    rule = "must be Python 3.11, 3.12 or 3.13 with its venv module"
    assert f"python3 is Python 3.{minor}; {rule}" in machine.refused(MINOR=minor)
    assert f"NPD_PYTHON=python3 is Python 3.{minor}; {rule}" in machine.refused(MINOR=minor, NPD_PYTHON="python3")
    assert not machine.environment.exists()


@pytest.mark.parametrize("minor", ["11", "12", "13"])
def test_the_pythons_that_were_tried_are_taken(machine: Machine, minor: str) -> None:
    assert machine.make(MINOR=minor).returncode == 0


def test_the_package_claims_the_same_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    claimed: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: claimed.update(keywords))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert claimed["python_requires"] == ">=3.11,<3.14"
    [torch] = [line for line in claimed["extras_require"]["cpu"] if line.startswith("torch==")]
    assert f"TORCH={torch.removeprefix('torch==')} " in SCRIPT.read_text()


def test_the_named_python_is_taken_or_refused(machine: Machine, tmp_path: Path) -> None:
    assert "NPD_PYTHON=nowhere not found; must be Python" in machine.refused(NPD_PYTHON="nowhere")
    assert "does not run; must be Python" in machine.refused(NPD_PYTHON=str(machine.bin / "mkdir"))
    (machine.bin / "python3.11").write_text("#!/bin/sh\nexit 1\n")
    (machine.bin / "python3.11").chmod(0o755)
    done = machine.make()
    assert done.returncode == 0 and f"with {machine.python}" in done.stdout, "one that does not run is passed over"


def test_no_python_at_all(machine: Machine) -> None:
    machine.python.unlink()
    assert "no Python on PATH; must be Python 3.11" in machine.refused()


def test_a_python_without_venv_is_refused(machine: Machine) -> None:
    said = machine.refused(BROKEN="sys.modules['ensurepip'] = None")
    assert "python3 has no venv module (on Debian and Ubuntu: apt-get install python3.12-venv); must be" in said


def test_an_environment_stays_of_its_python(machine: Machine, tmp_path: Path) -> None:
    assert machine.make().returncode == 0
    other = tmp_path / "other"
    other.write_text(PYTHON.replace("MINOR:-12", "MINOR:-13"))
    other.chmod(0o755)
    said = machine.refused(NPD_PYTHON=str(other))
    assert "is of Python 3.12, NPD_PYTHON=" in said and "of 3.13: remove the folder or name another" in said
    assert "bin/python is Python 3.10; must be" in machine.refused(MINOR="10")


def test_no_environment_can_be_made(machine: Machine) -> None:
    error = "Traceback\nError: [Errno 28] No space left on device: 'x'"
    assert "can be made there: Error: [Errno 28] No space left on device: 'x'" in machine.refused(VENV_ERROR=error)


def test_a_disk_without_room_is_refused_before_anything_is_downloaded(machine: Machine) -> None:
    full = "import shutil; shutil.disk_usage = lambda place: type('', (), {'free': 3.5e9})"
    assert "3.5 GB free; must be at least 9.5 GB (NPD_ENV names" in machine.refused(BROKEN=full, TORCH_LINE=CUDA_LINE)
    assert not machine.installations
    assert machine.make(BROKEN=full, TORCH_LINE=CPU_LINE).returncode == 0
    shutil.rmtree(machine.environment)
    assert "0.0 GB free; must be at least 2.3 GB" in machine.refused(BROKEN=full.replace("3.5e9", "0"))
    assert not machine.environment.exists()


@pytest.mark.parametrize("reason", ["[Errno 28] No space left on device", "[Errno 122] Disk quota exceeded"])
def test_a_disk_that_fills_up_is_named(machine: Machine, reason: str) -> None:
    error = f"ERROR: Could not install packages due to an OSError: {reason}"
    assert "environment: the disk is full" in machine.refused(PIP_ERROR=error)


def test_another_failure_of_pip_is_its_own(machine: Machine) -> None:
    done = machine.make(PIP_ERROR="ERROR: No matching distribution found for torch==2.13.0")
    assert done.returncode == 7 and done.stderr == "ERROR: No matching distribution found for torch==2.13.0\n"
    assert not (machine.environment / ".made_by_make_env").exists()


def test_a_folder_that_is_no_environment_is_left_alone(machine: Machine) -> None:
    machine.environment.mkdir()
    (machine.environment / "mine").touch()
    assert "is not empty and is no virtual environment" in machine.refused()
    assert "usage: tools/make_env.sh DIR" in machine.refused(machine.environment, "more")
    assert os.listdir(machine.environment) == ["mine"]
