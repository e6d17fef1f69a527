"""What the `[slurm]` table may not say: options that contradict each other, and words the shell would tear."""

from __future__ import annotations

from megatron_npd.config import Config
from megatron_npd.errors import UserError
from megatron_npd.roles import ROLES


def check(config: Config) -> None:
    """Refuse options that contradict each other.

    Raises:
        UserError: see `render`.
    """
    slurm, launch = config.slurm, config.launch
    for key, value in _words(config).items():
        if any(character.isspace() for character in value):
            raise UserError(f"slurm.{key} = {value!r}: must be one word")
    for option in (*slurm.sbatch_options, *slurm.srun_options):
        if not option.startswith("-") or "\n" in option:
            raise UserError(f"slurm options: {option!r}: must be one option, such as --reservation=npd")
    if slurm.checkpoint_seconds <= launch.grace_seconds:
        raise UserError(
            f"slurm.checkpoint_seconds = {slurm.checkpoint_seconds}: must exceed launch.grace_seconds = "
            f"{launch.grace_seconds:g}, the time the trainer has to save a checkpoint"
        )
    if seconds_of(slurm.time_limit) <= slurm.checkpoint_seconds:
        raise UserError(
            f"slurm.time_limit = {slurm.time_limit!r}: must exceed slurm.checkpoint_seconds = "
            f"{slurm.checkpoint_seconds}"
        )
    if slurm.container != "none" and not slurm.image:
        raise UserError(f"slurm.container = {slurm.container!r}: needs slurm.image")
    for key in ("image", "rollout_image", "mounts"):
        if slurm.container == "none" and getattr(slurm, key):
            raise UserError(f"slurm.{key} = {getattr(slurm, key)!r}: needs slurm.container, pyxis or apptainer")
    if slurm.jobs > 1 and slurm.continue_by == "requeue":
        raise UserError(f"slurm.jobs = {slurm.jobs}: needs slurm.continue_by, array or dependency")
    if slurm.heterogeneous and slurm.continue_by == "array":
        raise UserError("slurm.continue_by = 'array': not with slurm.heterogeneous; Slurm has no arrays of such jobs")


def _words(config: Config) -> dict[str, str]:
    slurm = config.slurm
    keys = ("job_name", "partition", "account", "qos", "constraint", "network_interface", "image", "rollout_image")
    words = {key: getattr(slurm, key) for key in keys}
    for role in ROLES:
        words |= {f"{role}.{key}": getattr(getattr(slurm, role), key) for key in ("partition", "constraint")}
    return words | {f"mounts[{index}]": mount for index, mount in enumerate(slurm.mounts)}


def seconds_of(limit: str) -> int:
    """Seconds of a time limit such as 30 (minutes), 30:00, 2:00:00, 1-12, 1-12:30 or 1-12:30:00."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # hours, minutes, seconds
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # minutes, seconds
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
