"""tools/make_gpu_env.sh: what it would run, in which order, and what it refuses. Running it takes gigabytes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from places import TOOLS

SCRIPT = TOOLS / "make_gpu_env.sh"


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NPD_")}
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=clean | environment)


def commands(*words: str | Path, **environment: str) -> list[str]:
    done = run("--dry-run", *words, **environment)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("make_gpu_env: ")]


def test_a_dry_run_prints_every_command_and_touches_nothing(tmp_path: Path) -> None:
    environment = tmp_path / "gpu env"
    lines = commands(environment)
    order = ["-m venv", "-e ", "setuptools", "--no-build-isolation", "kernels/build.py", "import_parts.py"]
    assert len(lines) == len(order)
    assert all(part in line for part, line in zip(order, lines, strict=True))
    assert all("constraints/gpu.txt" in lines[index] for index in (1, 3))
    assert "transformer-engine" in lines[3] and "transformer-engine" not in lines[1]
    assert not list(tmp_path.iterdir())


def test_transformer_engine_can_be_left_out(tmp_path: Path) -> None:
    lines = commands(tmp_path / "env", NPD_WITHOUT_TE="1")
    assert not any("transformer-engine" in line for line in lines)
    assert any("kernels/build.py" in line for line in lines)


def test_pip_gets_the_users_words(tmp_path: Path) -> None:
    lines = commands(tmp_path / "env", NPD_PIP_ARGS="--find-links /wheels")
    assert all("--find-links /wheels" in line for line in lines if " -m pip " in line)


@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--wet-run", "x"), ("a", "b")])
def test_wrong_usage_is_one_line(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert done.stderr == "make_gpu_env: error: usage: tools/make_gpu_env.sh [--dry-run] DIR\n"


def test_what_is_no_environment_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    done = run("--dry-run", tmp_path)
    assert done.returncode == 2 and "is no virtual environment; name another folder" in done.stderr


def test_another_python_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "env", NPD_PYTHON="/nowhere/python3.12")
    assert done.returncode == 2 and "must be Python 3.12 (NPD_PYTHON names another)" in done.stderr
    assert not (tmp_path / "env").exists()
