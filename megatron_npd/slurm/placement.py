"""Which role works on which nodes and devices of a Slurm job: a pure function of the configuration.

The trainer comes first, on the first devices of the job: what would end the job if it were lost is on the node of the
batch script. Then come the annotators and the sidecars, each on the first node that has room for it. Whatever talks all
the time, a tensor-parallel group or one engine, stays on one node. For example, 4 trainer ranks, one annotator of 2 and
four sidecars of 1 on nodes of 8 GPUs:

    node 0   trainer 0-3   annotator 4-5   rollout 6-7
    node 1   rollout 0-1
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_npd.config import Config, SlurmRoleConfig
from megatron_npd.errors import UserError
from megatron_npd.roles import ANNOTATOR, ROLES, TRAINER


@dataclass(frozen=True)
class Component:
    """Nodes of one kind: a whole job, or the part of a heterogeneous job that one role has."""

    nodes: int
    devices_per_node: int
    gpus: bool
    """Whether the devices are GPUs."""
    partition: str
    constraint: str


@dataclass(frozen=True)
class PlacedRole:
    """What one srun starts: the trainer, or all that an annotator's or the sidecars' role has on one node."""

    role: str
    component: int
    first_node: int
    """Number of its first node in the whole job."""
    nodes: int
    tasks_per_node: int
    first_device: int
    """Its first device on each of its nodes."""
    devices: int
    """Its devices on each of its nodes."""

    @property
    def name(self) -> str:
        """What people call it."""
        return self.role if self.role == TRAINER else f"{self.role}.node{self.first_node}"


@dataclass(frozen=True)
class JobLayout:
    """All nodes of a job and all steps on them."""

    components: list[Component]
    steps: list[PlacedRole]

    @property
    def nodes(self) -> int:
        return sum(component.nodes for component in self.components)

    @property
    def idle_devices(self) -> int:
        """Devices the job takes and nobody uses."""
        there = sum(component.nodes * component.devices_per_node for component in self.components)
        return there - sum(step.nodes * step.devices for step in self.steps)


def place_roles(config: Config) -> JobLayout:
    """Place every role.

    Raises:
        UserError: a role does not fit on the nodes; the line names the key, its value and the rule.
    """
    slurm = config.slurm
    for role in ROLES:
        _check_role_nodes(config, role)
    components: list[Component] = []
    steps: list[PlacedRole] = []
    nodes = _Nodes(config, ROLES[0], 0)
    for role in ROLES:
        if slurm.heterogeneous and role != ROLES[0]:
            components.append(nodes.component())
            nodes = _Nodes(config, role, nodes.first + len(nodes.free))
        elif not slurm.share_nodes:
            nodes.close()
        steps += _place(config, role, nodes, len(components))
    return JobLayout([*components, nodes.component()], steps)


class _Nodes:
    """The nodes of one component while roles are placed on them."""

    def __init__(self, config: Config, role: str, first: int):
        slurm, own = config.slurm, _own_nodes(config, role)
        gpus = slurm.gpus_per_node if own.gpus_per_node < 0 else own.gpus_per_node
        self.first = first
        self.per_node = gpus or slurm.processes_per_node
        self.key = "slurm.processes_per_node" if not gpus else (
            "slurm.gpus_per_node" if own.gpus_per_node < 0 else f"slurm.{role}.gpus_per_node"
        )  # fmt: skip
        self.free: list[int] = []
        """Devices that are left on each node."""
        self._gpus = gpus > 0
        self._closed = 0
        self._partition, self._constraint = own.partition or slurm.partition, own.constraint or slurm.constraint

    def component(self) -> Component:
        return Component(len(self.free), self.per_node, self._gpus, self._partition, self._constraint)

    def close(self) -> None:
        """Put nothing more on the nodes there are."""
        self._closed = len(self.free)

    def take(self, devices: int) -> tuple[int, int]:
        """Node, and its first device, with room for so many devices."""
        open_nodes = range(self._closed, len(self.free))
        node = next((node for node in open_nodes if self.free[node] >= devices), len(self.free))
        if node == len(self.free):
            self.free.append(self.per_node)
        first = self.per_node - self.free[node]
        self.free[node] -= devices
        return self.first + node, first


def _place(config: Config, role: str, nodes: _Nodes, component: int) -> list[PlacedRole]:
    if role == TRAINER:
        return [_place_trainer(config, nodes, component)]
    if role == ANNOTATOR:
        size, count = config.annotator.tensor_model_parallel_size, config.slurm.annotators
    else:
        size, count = config.rollout.tensor_model_parallel_size, config.slurm.sidecars
    if size > nodes.per_node:
        raise UserError(
            f"{role}.tensor_model_parallel_size = {size}: must not exceed {nodes.key} = {nodes.per_node}: its ranks "
            "must share a node"
        )
    places = [nodes.take(size) for _ in range(count)]
    steps = []
    for node in dict(places):
        here = [device for at, device in places if at == node]
        tasks = len(here) * (size if role == ANNOTATOR else 1)
        steps.append(PlacedRole(role, component, node, 1, tasks, here[0], len(here) * size))
    return steps


def _place_trainer(config: Config, nodes: _Nodes, component: int) -> PlacedRole:
    ranks, tensor = config.training.world_size, config.training.tensor_model_parallel_size
    if tensor > nodes.per_node:
        raise UserError(
            f"training.tensor_model_parallel_size = {tensor}: must not exceed {nodes.key} = {nodes.per_node}: the "
            "ranks that share a layer must share a node"
        )
    if ranks > nodes.per_node and ranks % nodes.per_node:
        raise UserError(
            f"{nodes.key} = {nodes.per_node}: the trainer has {ranks} ranks (tensor × pipeline × context × data "
            "parallel size); must divide that, or be no less"
        )
    here = min(ranks, nodes.per_node)
    if here % tensor:
        raise UserError(
            f"training.tensor_model_parallel_size = {tensor}: must divide {nodes.key} = {nodes.per_node}: the ranks "
            "that share a layer must share a node"
        )
    places = [nodes.take(here) for _ in range(ranks // here)]
    return PlacedRole(TRAINER, component, places[0][0], len(places), here, 0, here)


def _own_nodes(config: Config, role: str) -> SlurmRoleConfig:
    return getattr(config.slurm, role)


def _check_role_nodes(config: Config, role: str) -> None:
    """Nodes of its own: only in a heterogeneous job, and then somewhere."""
    own, slurm = _own_nodes(config, role), config.slurm
    if slurm.heterogeneous:
        if not (own.partition or slurm.partition):
            raise UserError(
                f"slurm.{role}.partition: missing; each role of a heterogeneous job needs one (or slurm.partition)"
            )
        return
    for key, value in own.model_dump(exclude_defaults=True).items():
        raise UserError(f"slurm.{role}.{key} = {value!r}: needs slurm.heterogeneous = true")
