"""What a task of an srun step must know before it works: its rank, its devices, and where its peers meet.

Slurm gives every step of this package all GPUs of its nodes, and the batch script says which of them a step may use
(`slurm.placement`). So a task sees no GPU of another role, and its local rank counts from 0.
"""

from __future__ import annotations

import fcntl
import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from megatron_npd.config import Config
from megatron_npd.errors import UserError
from megatron_npd.process.metrics import INSTANCE
from megatron_npd.roles import ANNOTATOR, ROLLOUT, TRAINER
from megatron_npd.run_directory import RunDirectory

NO_GPUS = "none"
LOOPBACK = "lo"
_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""


def task_environment(config: Config, role: str, devices: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables to add in a task.

    Args:
        role: trainer, annotator or rollout.
        devices: its step's GPUs on every node, e.g. "0-3" or "5"; "none" on nodes without.
        environ: the environment srun gave the task.

    Raises:
        UserError: no srun started it, or the step does not have the tasks or the GPUs the configuration asks for.
    """
    try:
        rank, tasks, local, nodes = (
            int(environ[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID", "STEP_NUM_NODES")
        )
        step = ".".join((environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"], environ.get("SLURM_RESTART_COUNT", "0")))
        node = environ["SLURMD_NODENAME"]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--slurm {devices}: {error.args[0]}: not set as srun does; must be a task of an srun step"
        ) from None
    gpus = _gpus(devices, environ, node)
    added = {INSTANCE: f"{node}.{local}"}
    if role == ROLLOUT:
        return added | _visible(_share(gpus, local, config.rollout.tensor_model_parallel_size, devices))
    group, world, name = 0, config.training.world_size, TRAINER
    if role == ANNOTATOR:
        world = config.annotator.tensor_model_parallel_size
        group, rank = divmod(local, world)
        name, nodes, tasks = f"{ANNOTATOR}.{node}.{group}", 1, world
    if tasks != world:
        raise UserError(f"SLURM_NTASKS = {tasks}: must be {world}, the trainer's ranks")
    if gpus and local >= len(gpus):
        raise UserError(f"--slurm {devices}: {len(gpus)} GPUs for more tasks than that on {node}; each needs its own")
    interface = config.slurm.network_interface if nodes > 1 else LOOPBACK
    return (
        added
        | _visible(gpus)
        | {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)}
        | {"NPD_ADDRESS_FILE": str(RunDirectory(Path(config.run_directory)).meeting(f"{name}.{step}").resolve())}
        | {"NPD_ADDRESS": own_address(interface, several_nodes=nodes > 1)}
        | ({"GLOO_SOCKET_IFNAME": interface} if interface else {})
        # NCCL's own choice is better on one node: it does not need a network there.
        | ({"NCCL_SOCKET_IFNAME": interface} if interface and nodes > 1 else {})
    )


def own_address(interface: str, several_nodes: bool) -> str:
    """IPv4 address of this host on an interface; without one, the address of its name.

    Raises:
        UserError: no such interface, or other nodes could not reach the address.
    """
    if interface:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", interface.encode()[:15])
            try:
                return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
            except OSError as error:
                raise UserError(
                    f"slurm.network_interface = {interface!r}: no address on {socket.gethostname()}: {error.strerror}"
                ) from None
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise UserError(f"{name}: no address for this host name ({error}); set slurm.network_interface") from None
    if several_nodes and address.startswith("127."):
        raise UserError(
            f"{name}: the host name means {address}, which other nodes cannot reach; set slurm.network_interface"
        )
    return address


def _gpus(devices: str, environ: Mapping[str, str], node: str) -> list[str]:
    """The names CUDA has for a step's devices on this node; none where there are no GPUs."""
    if devices == NO_GPUS:
        return []
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", devices)
    if not found:
        raise UserError(f"--slurm {devices}: must be GPUs of a node such as 0-3 or 5, or {NO_GPUS}")
    first, last = int(found.group(1)), int(found.group(2) or found.group(1))
    names = environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = names.split(",") if names else [str(index) for index in range(last + 1)]
    if last >= len(visible):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES = {names}: node {node} shows {len(visible)} GPUs; this step uses {devices} of them "
            "(slurm.gpus_per_node)"
        )
    return visible[first : last + 1]


def _share(gpus: list[str], local: int, size: int, devices: str) -> list[str]:
    """The GPUs of one of several engines on a node."""
    share = gpus[local * size : (local + 1) * size]
    if gpus and len(share) != size:
        raise UserError(f"--slurm {devices}: holds no {size} GPUs for sidecar {local} of its node")
    return share


def _visible(gpus: list[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
