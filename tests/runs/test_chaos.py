"""The short version of tools/chaos.py: kill -9 on the real pipeline, and nothing is lost, doubled or left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import TOOLS

TOOL = TOOLS / "chaos.py"
KILLS = 4


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    report = tmp_path / "chaos.json"
    command = [sys.executable, str(TOOL), "--tiny", str(tmp_path / "chaos"), "--json", str(report)]
    command += ["--kills", str(KILLS), "--mean-seconds", "8", "--seed", "3", "--set", "launch.max_restarts=100"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    outcome = json.loads(report.read_text())
    assert sum(outcome["kills"].values()) == KILLS and outcome["faults"] == []
    assert outcome["samples"] == 72 * outcome["runs"] and outcome["versions"] == 4 * outcome["runs"]
