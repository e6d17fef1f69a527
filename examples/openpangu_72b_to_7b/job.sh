#!/usr/bin/env bash
# Near-Policy Distillation of examples/openpangu_72b_to_7b/run.toml: rendered by `npd slurm`, sent with `sbatch FILE`.
#
#   trainer    nodes 0-1    8 processes a node, GPUs 0-7
#   annotator  node 2       8 processes, GPUs 0-7
#   annotator  node 3       4 processes, GPUs 0-3
#   rollout    node 3       1 process, GPUs 4-7
#
#SBATCH --job-name=openpangu_72b_to_7b
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1200
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0

# shellcheck disable=SC1091  # what `setup` sources is not here
set -euo pipefail
source .venv/bin/activate
# On GPUs the plain torch reference is several times slower: the fused operators or one line that says why not.
[[ ${NPD_DISABLE_KERNELS:-0} != 0 ]] || export NPD_REQUIRE_KERNELS="${NPD_REQUIRE_KERNELS:-1}"

CONFIG=examples/openpangu_72b_to_7b/run.toml
RUN=runs/openpangu_72b_to_7b
SETTINGS=(--set launch.turns=off)

# The job's nodes, numbered as above.
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Steps overlap: this script divides the devices, not Slurm. `npd ROLE --slurm 4-5` takes GPUs 4 and 5 of its node.
SRUN=(srun --overlap --cpu-bind=none --mpi=none --kill-on-bad-exit=1 --wait=0 --unbuffered --open-mode=append)

steps=()
step() { # NAME FIRST_NODE NODES TASKS_PER_NODE DEVICES COMMAND...
    local name=$1 nodes
    nodes=$(IFS=, && echo "${NODES[*]:$2:$3}")
    steps+=(--step "$name" "${SRUN[@]}" --job-name="$name" --output="$RUN/logs/$name.rank%t.log"
        --nodelist="$nodes" --nodes="$3" --ntasks-per-node="$4" --ntasks="$(($3 * $4))"
        npd "${@:6}" "$RUN/config.toml" --slurm "$5")
}
step trainer 0 2 8 0-7 trainer
step annotator.node2 2 1 8 0-7 annotator
step annotator.node3 3 1 4 0-3 annotator
step rollout.node3 3 1 1 4-7 rollout --policy all

# Checks everything, then makes the run directory or finds it made by an earlier job.
npd prepare "$CONFIG" "${SETTINGS[@]}"

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
0) npd report "$RUN" ;;
138 | 75) scontrol requeue "$SLURM_JOB_ID" ;; # stopped in time, or lost a node: starts again and goes on
esac
exit "$status"
