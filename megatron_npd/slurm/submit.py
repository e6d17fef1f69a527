"""Handing a rendered script to sbatch."""

from __future__ import annotations

import subprocess

from megatron_npd.config import Config
from megatron_npd.errors import UserError

SBATCH_SECONDS = 120.0


def submit(config: Config, script: str) -> list[str]:
    """Send the script as often as the configuration asks for; the ids of the jobs.

    Raises:
        UserError: there is no sbatch here, or it refuses the script, with what it says.
    """
    chained = config.slurm.continue_by == "dependency"
    jobs: list[str] = []
    for _ in range(config.slurm.jobs if chained else 1):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(_sbatch([*after, "--parsable"], script))
    return jobs


def _sbatch(options: list[str], script: str) -> str:
    """Send one script by standard input: Slurm keeps a copy, and no file is left behind."""
    try:
        done = subprocess.run(
            ["sbatch", *options], input=script, capture_output=True, text=True, check=False, timeout=SBATCH_SECONDS
        )
    except FileNotFoundError:
        raise UserError("sbatch: not on the PATH; render the script here and submit it on a login node") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch: no answer within {SBATCH_SECONDS:.0f} s") from None
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout.strip().split(";")[0]  # with several clusters: ID;CLUSTER
