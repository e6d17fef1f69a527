"""The sbatch script of a run: divides the nodes, starts a step a role, and hands over before the time is up."""

from __future__ import annotations

import shlex
from itertools import groupby
from pathlib import Path

from megatron_npd.config import Config
from megatron_npd.errors import NODE_LOST_STATUS
from megatron_npd.roles import ROLLOUT
from megatron_npd.slurm.options import check
from megatron_npd.slurm.placement import Component, JobLayout, PlacedRole, place_roles
from megatron_npd.slurm.task import NO_GPUS

SCRIPT = r"""

# shellcheck disable=SC1091  # what `setup` sources is not here
set -euo pipefail
@SETUP@@KERNELS@
CONFIG=@CONFIG@
RUN=@RUN@
SETTINGS=(@SETTINGS@)

# The job's nodes, numbered as above.
mapfile -t NODES < <(@LISTS@)

# Steps overlap: this script divides the devices, not Slurm. `npd ROLE --slurm 4-5` takes GPUs 4 and 5 of its node.
SRUN=(srun --overlap --cpu-bind=none --mpi=none --kill-on-bad-exit=1 --wait=0 --unbuffered --open-mode=append@SRUN@)
@CONTAINER@
steps=()
step() { # NAME FIRST_NODE NODES TASKS_PER_NODE DEVICES COMMAND...
    local name=$1 nodes
    nodes=$(IFS=, && echo "${NODES[*]:$2:$3}")
    steps+=(--step "$name" "${SRUN[@]}" --job-name="$name" --output="$RUN/logs/$name.rank%t.log"
        --nodelist="$nodes" --nodes="$3" --ntasks-per-node="$4" --ntasks="$(($3 * $4))"@STEP@
        npd "${@:6}" "$RUN/config.toml" --slurm "$5")
}
@STEPS@

# Checks everything, then makes the run directory or finds it made by an earlier job.
@FIRST@npd prepare "$CONFIG" "${SETTINGS[@]}"

# One srun a step. A step that fails is started again. If its node is lost, the run goes on without it as long as others
# of its role are left. When the time limit is near, the trainer saves a checkpoint.
npd supervise "$RUN/config.toml" "${steps[@]}" &
supervisor=$!
trap 'kill -USR1 "$supervisor"' USR1
trap 'kill -TERM "$supervisor"' TERM
status=0
while
    wait "$supervisor" && status=0 || status=$?
    kill -0 "$supervisor" 2>/dev/null # a signal ended the wait, not the supervisor
do :; done

case $status in
0) @FIRST@npd report "$RUN" ;;
@CONTINUE@
esac
exit "$status"
"""

KERNELS = """\
# On GPUs the plain torch reference is several times slower: the fused operators or one line that says why not.
[[ ${NPD_DISABLE_KERNELS:-0} != 0 ]] || export NPD_REQUIRE_KERNELS="${NPD_REQUIRE_KERNELS:-1}"
"""


def render(config: Config, path: str, settings: list[str]) -> str:
    """The script for a configuration file.

    Args:
        path: of the configuration, as the job will find it: from the folder it is submitted from, or absolute.
        settings: `--set` overrides to repeat in the job.

    Raises:
        UserError: the roles do not fit on the nodes, or options contradict each other.
    """
    check(config)
    layout = place_roles(config)
    gpus = any(component.gpus for component in layout.components)
    if config.launch.turns == "auto":  # meant for one machine: nodes must not wait for each other
        settings = [*settings, "launch.turns=off"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    parts = {
        "SETUP": "".join(f"{line}\n" for line in config.slurm.setup),
        "KERNELS": KERNELS if gpus else "",
        "CONFIG": shlex.quote(path),
        "RUN": shlex.quote(config.run_directory),
        "SETTINGS": shlex.join(overrides),
        "LISTS": _node_lists(layout),
        "SRUN": "".join(f" {shlex.quote(option)}" for option in config.slurm.srun_options),
        "STEPS": "\n".join(_step_lines(config, layout)),
        **_container(config, gpus),
        "CONTINUE": _continuation(config),
    }
    body = SCRIPT
    for name, text in parts.items():
        body = body.replace(f"@{name}@", text)
    return "\n".join(["#!/usr/bin/env bash", *_explanation(path, layout), *_directives(config, layout)]) + body


def _explanation(path: str, layout: JobLayout) -> list[str]:
    lines = [f"# Near-Policy Distillation of {path}: rendered by `npd slurm`, sent with `sbatch FILE`.", "#"]
    for alike in _alike(layout):
        step, nodes = alike[0], sum(step.nodes for step in alike)
        at = f"node {step.first_node}" if nodes == 1 else f"nodes {step.first_node}-{step.first_node + nodes - 1}"
        tasks = (
            f"{step.tasks_per_node} process{'es' if step.tasks_per_node > 1 else ''}{' a node' if nodes > 1 else ''}"
        )
        has_gpus = layout.components[step.component].gpus
        gpus = f", GPU{'s' if step.devices > 1 else ''} {_devices(layout, step)}" if has_gpus else ""
        lines.append(f"#   {step.role:<10} {at:<12} {tasks}{gpus}")
    if layout.idle_devices:
        lines.append(f"#   idle: {layout.idle_devices} of all devices")
    return [*lines, "#"]


def _directives(config: Config, layout: JobLayout) -> list[str]:
    slurm = config.slurm
    array = slurm.continue_by == "array"
    options = [
        f"--job-name={config.slurm.job_name or Path(config.run_directory).name}",
        f"--output=%x-{'%A_%a' if array else '%j'}.log",
        "--open-mode=append",
        f"--time={slurm.time_limit}",
        f"--signal=B:USR1@{slurm.checkpoint_seconds}",
        "--requeue" if slurm.continue_by == "requeue" else "--no-requeue",
        "--no-kill",  # a node may fail: see below
        *([f"--array=1-{slurm.jobs}%1"] if array else []),
        *(f"--{key}={getattr(slurm, key)}" for key in ("account", "qos") if getattr(slurm, key)),
        *slurm.sbatch_options,
    ]
    lines = [f"#SBATCH {option}" for option in options]
    for index, component in enumerate(layout.components):
        lines += ["#SBATCH hetjob"] if index else []
        lines += [f"#SBATCH {option}" for option in _node_options(config, component)]
    return lines


def _node_options(config: Config, component: Component) -> list[str]:
    cpus = config.slurm.cpus_per_device
    return [
        f"--nodes={component.nodes}",
        *(f"--{key}={value}" for key in ("partition", "constraint") if (value := getattr(component, key))),
        *([f"--gpus-per-node={component.devices_per_node}"] if component.gpus else []),
        f"--ntasks-per-node={component.devices_per_node}",
        f"--cpus-per-task={cpus}" if cpus else "--exclusive",
        *([f"--mem={config.slurm.memory_per_node}"] if config.slurm.memory_per_node else []),
    ]


def _node_lists(layout: JobLayout) -> str:
    if len(layout.components) == 1:
        return 'scontrol show hostnames "$SLURM_JOB_NODELIST"'
    lists = (f'scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_{i}"' for i in range(len(layout.components)))
    return "; ".join(lists)


def _step_lines(config: Config, layout: JobLayout) -> list[str]:
    """One call of `step` each; nodes in a row that do the same are one loop."""
    lines = []
    for steps in _alike(layout):
        first, last = steps[0].first_node, steps[-1].first_node
        step, count = steps[0], len(steps)
        node, name = (str(first), step.name) if count == 1 else ('"$node"', f'"{step.role}.node$node"')
        group = f"GROUP={step.component} " if len(layout.components) > 1 else ""
        image = f"IMAGE={shlex.quote(_image(config, step.role))} " if config.slurm.container != "none" else ""
        command = "rollout --policy all" if step.role == ROLLOUT else step.role
        call = f"{group}{image}step {name} {node} {step.nodes} {step.tasks_per_node} {_devices(layout, step)} {command}"
        lines.append(call if count == 1 else f"for node in {{{first}..{last}}}; do {call}; done")
    return lines


def _alike(layout: JobLayout) -> list[list[PlacedRole]]:
    """The steps, together where they differ in their node alone and their nodes follow each other."""

    def signature(item: tuple[int, PlacedRole]) -> tuple[object, ...]:
        index, step = item
        return step.role, step.component, step.nodes, step.tasks_per_node, step.first_device, step.first_node - index

    return [[step for _, step in alike] for _, alike in groupby(enumerate(layout.steps), key=signature)]


def _devices(layout: JobLayout, step: PlacedRole) -> str:
    if not layout.components[step.component].gpus:
        return NO_GPUS
    last = step.first_device + step.devices - 1
    return f"{step.first_device}-{last}" if step.devices > 1 else str(last)


def _image(config: Config, role: str) -> str:
    return (role == ROLLOUT and config.slurm.rollout_image) or config.slurm.image


def _container(config: Config, gpus: bool) -> dict[str, str]:
    """What goes between srun's options and `npd`, and how the batch script runs an `npd` that needs the image."""
    slurm = config.slurm
    group = ' --het-group="$GROUP"' if slurm.heterogeneous else ""
    if slurm.container == "none":
        return {"CONTAINER": "", "STEP": group, "FIRST": ""}
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in slurm.mounts]
    if slurm.container == "pyxis":
        words = '--container-image="$IMAGE" --container-workdir="$PWD"'
        words += ' --container-mounts="$MOUNTS"' if mounts else ""
    else:
        words = "apptainer exec" + (" --nv" if gpus else "") + ' --pwd "$PWD"'
        words += ' --bind "$MOUNTS"' if mounts else ""
        words += ' "$IMAGE"'
    first = f"MOUNTS={shlex.quote(','.join(mounts))}\n" if mounts else ""
    first += (
        f"first() {{ # COMMAND..., in the container, on the first node\n    IMAGE={shlex.quote(slurm.image)}\n"
        f'    "${{SRUN[@]}}" --nodelist="${{NODES[0]}}" --nodes=1 --ntasks=1 --ntasks-per-node=1 {words} "$@"\n}}\n'
    )
    return {"CONTAINER": f"\n{first}", "STEP": f"{group} {words}", "FIRST": "first "}


def _continuation(config: Config) -> str:
    """What the script does when the run can go on in another job."""
    when = f"138 | {NODE_LOST_STATUS})"
    if config.slurm.continue_by == "requeue":
        return f'{when} scontrol requeue "$SLURM_JOB_ID" ;; # stopped in time, or lost a node: starts again and goes on'
    return f"{when} status=0 ;; # stopped in time, or lost a node: the next job goes on"
