"""The `[slurm]` table: how `npd slurm` lays a run out over the nodes of a cluster. Decides nothing that is computed.

A *device* is a GPU; on nodes without GPUs it is the place of one process. Every process of the trainer and of an
annotator takes one, a rollout sidecar as many as its engine spans (`rollout.tensor_model_parallel_size`). How many
nodes that takes follows; `slurm.placement` has the rules.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_npd.config.section import Section


class SlurmRoleConfig(Section):
    """The nodes of one role in a heterogeneous job; what is left out is as in `[slurm]`."""

    partition: str = ""
    """Partition of these nodes."""
    constraint: str = ""
    """Features these nodes must have."""
    gpus_per_node: int = Field(-1, ge=-1)
    """GPUs of these nodes; -1: as in `[slurm]`."""


class SlurmConfig(Section):
    job_name: str = ""
    """Name of the job. Empty: that of the run directory."""
    partition: str = ""
    """Partition; empty: the cluster's default."""
    account: str = ""
    """Account the time is charged to; empty: the user's default."""
    qos: str = ""
    """Quality of service; empty: the default."""
    constraint: str = ""
    """Features the nodes must have."""
    time_limit: str = Field("24:00:00", pattern=r"^(\d+-)?\d+(:\d{1,2}){0,2}$")
    """Time limit of one job, as sbatch reads it: minutes, H:MM:SS, D-HH ..."""
    checkpoint_seconds: int = Field(600, ge=60)
    """So long before the time limit the run is asked to save a checkpoint and stop. Slurm may do it a minute early."""
    continue_by: Literal["requeue", "array", "dependency"] = "requeue"
    """How a run goes on that needs more than one job: the job puts itself back into the queue; or `jobs` jobs are there
    from the beginning, as an array one task of which runs at a time, or each depending on the one before."""
    jobs: int = Field(1, ge=1)
    """Jobs of an array, or of a chain of dependencies. Those that find nothing to do end at once."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of a node, all of which the job takes; 0: nodes without GPUs."""
    gpu_memory_gib: float = Field(80.0, gt=0.0)
    """Memory of a GPU, GiB. `npd check` points out what is estimated to need more."""
    processes_per_node: int = Field(1, ge=1)
    """Devices of a node without GPUs: processes it has room for."""
    cpus_per_device: int = Field(0, ge=0)
    """CPU cores asked for with each device; 0: the job takes whole nodes, with all their cores."""
    memory_per_node: str = Field("0", pattern=r"^(\d+[KMGT]?)?$")
    """Memory asked for, as sbatch reads it; "0": all of a node; empty: the cluster's default."""
    sidecars: int = Field(1, ge=1)
    """Rollout sidecars."""
    annotators: int = Field(1, ge=1)
    """Annotators, of `annotator.tensor_model_parallel_size` processes each."""
    share_nodes: bool = True
    """Roles may share a node, each on devices of its own. false: every role starts on a node of its own."""
    heterogeneous: bool = False
    """A heterogeneous job: one component a role, on the nodes `[slurm.trainer]`, `[slurm.annotator]` and
    `[slurm.rollout]` ask for. Roles then share no node."""
    trainer: SlurmRoleConfig = SlurmRoleConfig()
    annotator: SlurmRoleConfig = SlurmRoleConfig()
    rollout: SlurmRoleConfig = SlurmRoleConfig()
    network_interface: str = ""
    """Interface the trainer's nodes talk over, for example ib0; empty: the one their host names resolve to."""
    setup: list[str] = Field([])
    """Shell commands the job runs first, for example `module load cuda` and `source .venv/bin/activate`."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """What runs the roles' containers. `npd` itself must also be on the PATH outside: its supervisor calls srun."""
    image: str = ""
    """Container image of every role."""
    rollout_image: str = ""
    """Container image of the rollout sidecars, whose vLLM may need another torch; empty: `image`."""
    mounts: list[str] = Field([])
    """What the containers see of the filesystem: SOURCE:DESTINATION, or a path that is the same inside."""
    sbatch_options: list[str] = Field([])
    """Further options of the job, for example `--reservation=npd`."""
    srun_options: list[str] = Field([])
    """Further options of every step."""
