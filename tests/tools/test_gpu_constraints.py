"""constraints/gpu.txt: its pins can be installed together, and nothing in them contradicts setup.py.

uv resolves, not pip: it resolves for Python 3.12 on Linux whatever runs the tests, and in seconds, from metadata alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

CONSTRAINTS = ROOT / "constraints" / "gpu.txt"
PINS = dict(re.findall(r"^([\w-]+)==([\w.]+)$", CONSTRAINTS.read_text(), re.MULTILINE))
UNREACHABLE = re.compile(r"error sending request|failed to fetch|dns error|connect|timed out", re.IGNORECASE)
BUILT_HERE = "transformer-engine-torch"
"""Has no wheel: its metadata can be made only where torch with CUDA is installed."""


@pytest.mark.slow
def test_the_pins_resolve_together_for_python_3_12(tmp_path: Path) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("no uv: pip install uv, or the extra `test`")
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "requirements.in").write_text(
        "".join(f"{name}\n" for name in PINS if name != BUILT_HERE)  # all pins, and what this package asks for:
        + f"megatron_npd[gpu] @ {tmp_path.as_uri()}\n"
    )
    target = ["--python-version=3.12", "--python-platform=x86_64-manylinux_2_28"]
    done = subprocess.run(
        [
            uv,
            "pip",
            "compile",
            "--no-config",
            "--no-annotate",
            *target,
            f"--constraint={CONSTRAINTS}",
            "requirements.in",
        ],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("UV_")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode and UNREACHABLE.search(done.stderr) and "No solution found" not in done.stderr:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    resolved = dict(re.findall(r"^([\w-]+)==([\w.]+)", done.stdout, re.MULTILINE))
    assert {name: resolved.get(name) for name in PINS if name != BUILT_HERE} == {
        name: version for name, version in PINS.items() if name != BUILT_HERE
    }
    # The headers of this runtime refuse a compiler of another release.
    assert PINS["nvidia-cuda-nvcc"].startswith(re.match(r"\d+\.\d+\.", resolved["nvidia-cuda-runtime"]).group())


def test_the_compiler_is_pinned_as_a_whole() -> None:
    parts = [name for name in PINS if name.startswith(("nvidia-cuda-", "nvidia-nvvm"))]
    assert len(parts) == 4 and len({PINS[name].rsplit(".", 1)[0] for name in parts}) == 1
    assert len({version for name, version in PINS.items() if name.startswith("transformer-engine")}) == 1
