"""The README's first command, as a user calls it: the real model, every role, the proof of the export at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from megatron_npd.hardware.matrix_rates import measure_rates

pytestmark = pytest.mark.slow

QUICKSTART = ROOT / "examples" / "quickstart"
SHORTER = {
    "warmup.prompts": 48,
    "rounds.count": 2,
    "rounds.prompts_per_round": 24,
    "rollout.max_new_tokens": 32,
    "rollout.samples_per_unit": 24,
    "selection.reject_truncated": "false",  # after so short a training most answers are cut
    "selection.tau": 5.0,
}


def test_first_command_of_the_readme_runs(tmp_path: Path) -> None:
    """With fewer prompts and shorter answers; in the environment of these tests, which it finds made."""
    run = tmp_path / "run"
    settings = {"run_directory": run, **SHORTER}
    for split, count in (("train", 48), ("heldout", 16)):
        lines = (QUICKSTART / "prompts" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:count]))
        settings[f"prompts.{split}"] = tmp_path / f"{split}.jsonl"
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(
        ["bash", str(QUICKSTART / "run.sh"), *words],
        env=os.environ | {"NPD_ENV": os.environ.get("NPD_ENV", sys.prefix)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * 15,  # beside another test on a poor machine
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    *_, report, after_it = done.stdout.splitlines()
    assert report == f"report: {run}/report.html" and (run / "report.html").is_file()
    assert after_it == "next:   examples/does_it_pay/README.md (does it pay?)"
    summary = json.loads((run / "summary.json").read_text())
    rates = measure_rates(threads=2)
    if not 0.8 < rates.gain < 1.8:  # else two measurements of one machine may disagree
        assert summary["settings"]["dtype"] == ("bfloat16" if rates.gain > 1 else "float32"), rates
    assert f"models.dtype = {summary['settings']['dtype']}: chosen by measurement: matrix products" in done.stdout
    assert summary["settings"]["trainer_ranks"] == 2 and summary["refreshes"] == 1
    assert summary["heldout_kl_after"] < 0.9 * summary["heldout_kl_before"], summary
    assert summary["rollouts_generated"] == 48 and summary["rollouts_kept"] > 0
