"""`npd slurm` without Slurm: which role works where, the script for it, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from megatron_npd.cli import main
from megatron_npd.config import Config, load_config
from megatron_npd.errors import UserError
from megatron_npd.slurm.options import seconds_of
from megatron_npd.slurm.placement import JobLayout, place_roles
from megatron_npd.slurm.script import render
from megatron_npd.slurm.srun_steps import parse_steps
from megatron_npd.slurm.task import own_address, task_environment

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
SetConfig = Callable[..., Config]


@pytest.fixture
def configured(tmp_path: Path) -> SetConfig:
    """A configuration with these `section.key` values."""

    def make(**values: object) -> Config:
        table = {
            "run_directory": "runs/a",
            "models": {"teacher": "t", "student": "s"},
            "prompts": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
            "annotator": {"pack_length": 4096},
        }
        path = tmp_path / "run.toml"
        path.write_text(tomli_w.dumps(table))
        overrides = [f"{key.replace('__', '.')}={toml(value)}" for key, value in values.items()]
        return load_config(path, overrides)

    return make


def toml(value: object) -> str:
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def places(layout: JobLayout) -> list[tuple[str, int, int, int, int, int]]:
    """(name, first node, nodes, tasks on each, first device, devices) of every step."""
    return [
        (step.name, step.first_node, step.nodes, step.tasks_per_node, step.first_device, step.devices)
        for step in layout.steps
    ]


def test_a_job_without_rounds_has_sidecars_for_the_teacher(configured: SetConfig) -> None:
    """They answer the held-out prompts, also where the warm-up's responses are given."""
    script = render(configured(rounds__count=0, warmup__source="data"), "run.toml", [])
    steps = [line.split()[1] for line in script.splitlines() if line.startswith("step ")]
    assert [step.split(".")[0] for step in steps] == ["trainer", "annotator", "rollout"]
    assert "rollout --policy all" in script


def test_roles_share_nodes_on_devices_of_their_own(configured: SetConfig) -> None:
    config = configured(
        training__data_parallel_size=4, annotator__tensor_model_parallel_size=2, slurm__sidecars=4
    )  # the example of `place_roles`
    layout = place_roles(config)
    assert places(layout) == [
        ("trainer", 0, 1, 4, 0, 4),
        ("annotator.node0", 0, 1, 2, 4, 2),
        ("rollout.node0", 0, 1, 2, 6, 2),
        ("rollout.node1", 1, 1, 2, 0, 2),
    ]
    assert (layout.nodes, layout.idle_devices) == (2, 6)


def test_no_device_is_given_twice_and_no_group_is_torn(configured: SetConfig) -> None:
    for data_parallel in (1, 2, 4, 8):
        for annotator, rollout in ((1, 1), (2, 4), (8, 2), (4, 8)):
            for share in (True, False):
                config = configured(
                    training__data_parallel_size=data_parallel,
                    training__tensor_model_parallel_size=2,
                    training__global_batch_size=8,
                    annotator__tensor_model_parallel_size=annotator,
                    rollout__tensor_model_parallel_size=rollout,
                    slurm__sidecars=5,
                    slurm__annotators=3,
                    slurm__share_nodes=share,
                )
                layout = place_roles(config)
                taken = [
                    (node, device)
                    for step in layout.steps
                    for node in range(step.first_node, step.first_node + step.nodes)
                    for device in range(step.first_device, step.first_device + step.devices)
                ]
                assert len(taken) == len(set(taken)) == 2 * data_parallel + 3 * annotator + 5 * rollout
                assert {device for _, device in taken} <= set(range(8))
                assert {node for node, _ in taken} == set(range(layout.nodes))
                roles_of_node = [{s.role for s in layout.steps if s.first_node == node} for node in range(layout.nodes)]
                assert share or all(len(roles) <= 1 for roles in roles_of_node)


def test_a_large_trainer_takes_whole_nodes(configured: SetConfig) -> None:
    layout = place_roles(
        configured(
            training__tensor_model_parallel_size=8,
            training__pipeline_model_parallel_size=2,
            training__data_parallel_size=2,
            slurm__sidecars=8,
        )
    )
    assert places(layout)[0] == ("trainer", 0, 4, 8, 0, 8)
    assert places(layout)[1] == ("annotator.node4", 4, 1, 1, 0, 1)


def test_nodes_without_gpus(configured: SetConfig) -> None:
    config = configured(
        training__tensor_model_parallel_size=2, slurm__gpus_per_node=0, slurm__processes_per_node=2, slurm__sidecars=2
    )
    assert places(place_roles(config)) == [
        ("trainer", 0, 1, 2, 0, 2),
        ("annotator.node1", 1, 1, 1, 0, 1),
        ("rollout.node1", 1, 1, 1, 1, 1),
        ("rollout.node2", 2, 1, 1, 0, 1),
    ]
    script = render(config, "run.toml", [])
    assert "gpus" not in script.lower().replace("takes gpus 4 and 5", "")
    assert "step trainer 0 1 2 none trainer" in script


def test_a_heterogeneous_job_has_a_component_a_role(configured: SetConfig) -> None:
    config = configured(
        training__data_parallel_size=8,
        slurm__heterogeneous=True,
        slurm__partition="big",
        slurm__rollout__partition="small",
        slurm__rollout__gpus_per_node=4,
        slurm__sidecars=8,
    )
    layout = place_roles(config)
    assert [(c.nodes, c.devices_per_node, c.partition) for c in layout.components] == [
        (1, 8, "big"),
        (1, 8, "big"),
        (2, 4, "small"),
    ]
    script = render(config, "run.toml", [])
    header = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    first, second, third = "\n".join(header).split("#SBATCH hetjob")
    assert "--time=" in first and "--signal=" in first and "--partition=big" in first
    assert "--partition=big" in second and "--time=" not in second
    assert "--partition=small" in third and "--gpus-per-node=4" in third and "--nodes=2" in third
    assert (
        'for node in {2..3}; do GROUP=2 step "rollout.node$node" "$node" 1 4 0-3 rollout --policy all; done' in script
    )


VARIANTS: dict[str, dict[str, object]] = {
    "defaults": {},
    "many sidecars": {"slurm__sidecars": 33, "slurm__cpus_per_device": 12},
    "heterogeneous": {"slurm__heterogeneous": True, "slurm__partition": "gpu", "slurm__sidecars": 9},
    "pyxis": {
        "slurm__container": "pyxis",
        "slurm__image": "docker://a/b:1",
        "slurm__mounts": ["/data", "/scratch:/run"],
    },
    "apptainer": {
        "slurm__container": "apptainer",
        "slurm__image": "trainer.sif",
        "slurm__rollout_image": "vllm.sif",
        "slurm__heterogeneous": True,
        "slurm__partition": "gpu",
    },
    "array": {"slurm__continue_by": "array", "slurm__jobs": 4},
    "dependency": {"slurm__continue_by": "dependency", "slurm__jobs": 4},
    "quotes": {"run_directory": "runs/it's mine", "slurm__setup": ["module load cuda"], "launch__turns": "on"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_script_is_good_shell(configured: SetConfig, tmp_path: Path, variant: str) -> None:
    script = render(configured(**VARIANTS[variant]), "my runs/run.toml", ["training.lr=2e-5"])
    path = tmp_path / "job.sh"
    path.write_text(script)
    for command in (["bash", "-n", str(path)], [SHELLCHECK or "shellcheck", str(path)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "@" not in script.replace("USR1@", "").replace("[@]", "").replace("${@:6}", "").replace('"$@"', "")
    head, _, body = script.partition("set -euo pipefail")
    assert "#SBATCH" in head and "#SBATCH" not in body, "sbatch reads no option after the first command"


def test_the_words_of_the_configuration_reach_the_shell_unharmed(configured: SetConfig, tmp_path: Path) -> None:
    script = render(configured(**VARIANTS["quotes"]), "it's.toml", ["models.teacher=a b"])
    lines = [line for line in script.splitlines() if line.startswith(("CONFIG=", "RUN=", "SETTINGS="))]
    show = 'printf "%s|" "$CONFIG" "$RUN" "${SETTINGS[@]}"'
    shown = subprocess.run(["bash", "-c", "\n".join([*lines, show])], capture_output=True, text=True, check=True).stdout
    assert shown == "it's.toml|runs/it's mine|--set|models.teacher=a b|"
    assert "module load cuda" in script.splitlines()


@pytest.mark.parametrize(
    ("setup", "required"),
    [
        ("", "1"),
        ("export NPD_REQUIRE_KERNELS=0", "0"),
        ("export NPD_DISABLE_KERNELS=1", "unset"),
        ("export NPD_DISABLE_KERNELS=0", "1"),
    ],
)
def test_on_gpus_the_fused_operators_are_required_unless_switched_off(
    configured: SetConfig, setup: str, required: str
) -> None:
    """They refuse to be required and switched off at once. Roles get the variable from srun, which passes all on."""
    start = render(configured(slurm__setup=[setup] if setup else []), "run.toml", []).partition("CONFIG=")[0]
    shown = subprocess.run(
        ["bash", "-c", start + 'echo "${NPD_REQUIRE_KERNELS-unset}"'],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown == f"{required}\n"
    assert "NPD_REQUIRE_KERNELS" not in render(configured(slurm__gpus_per_node=0), "run.toml", [])


def test_nodes_do_not_take_turns_unless_told_to(configured: SetConfig) -> None:
    assert "--set launch.turns=off" in render(configured(), "run.toml", [])
    assert "launch.turns" not in render(configured(launch__turns="on"), "run.toml", [])


def test_how_a_run_goes_on(configured: SetConfig) -> None:
    requeue, array, chain = (
        render(configured(**options), "run.toml", []) for options in ({}, VARIANTS["array"], VARIANTS["dependency"])
    )
    assert "--requeue" in requeue and '138 | 75) scontrol requeue "$SLURM_JOB_ID"' in requeue
    assert "--array=1-4%1" in array and "--no-requeue" in array and "138 | 75) status=0" in array
    assert "--array" not in chain and "138 | 75) status=0" in chain
    assert all("--signal=B:USR1@600" in script and "--no-kill" in script for script in (requeue, array, chain))


def test_containers_hold_npd_and_nothing_else(configured: SetConfig) -> None:
    pyxis = render(configured(**VARIANTS["pyxis"]), "run.toml", [])
    assert '--container-image="$IMAGE" --container-workdir="$PWD" --container-mounts="$MOUNTS"' in pyxis
    assert "\nMOUNTS=/data:/data,/scratch:/run\n" in pyxis
    assert "IMAGE=docker://a/b:1 step trainer" in pyxis
    assert 'first npd prepare "$CONFIG"' in pyxis and '\nnpd supervise "$RUN/config.toml"' in pyxis
    apptainer = render(configured(**VARIANTS["apptainer"]), "run.toml", [])
    assert 'apptainer exec --nv --pwd "$PWD" "$IMAGE"\n        npd "${@:6}"' in apptainer
    assert "GROUP=0 IMAGE=trainer.sif step trainer" in apptainer
    assert "GROUP=2 IMAGE=vllm.sif step rollout.node2" in apptainer


REFUSED = {
    "ranks": (
        {"training__data_parallel_size": 12, "training__global_batch_size": 12},
        ["gpus_per_node = 8", "12 ranks"],
    ),
    "tensor parallel": (
        {"training__tensor_model_parallel_size": 16},
        ["training.tensor_model_parallel_size = 16", "gpus_per_node = 8"],
    ),
    "torn groups": (
        {
            "training__tensor_model_parallel_size": 4,
            "training__data_parallel_size": 3,
            "training__global_batch_size": 3,
            "slurm__gpus_per_node": 6,
        },
        ["training.tensor_model_parallel_size = 4", "slurm.gpus_per_node = 6"],
    ),
    "annotator": (
        {"annotator__tensor_model_parallel_size": 4, "slurm__gpus_per_node": 2},
        ["annotator.tensor_model_parallel_size = 4", "slurm.gpus_per_node = 2"],
    ),
    "engine": (
        {"rollout__tensor_model_parallel_size": 2, "slurm__gpus_per_node": 0},
        ["rollout.tensor_model_parallel_size = 2", "slurm.processes_per_node = 1"],
    ),
    "nodes of a role": ({"slurm__rollout__partition": "x"}, ["slurm.rollout.partition = 'x'", "heterogeneous = true"]),
    "partition": ({"slurm__heterogeneous": True}, ["slurm.trainer.partition", "missing"]),
    "array": (
        {"slurm__heterogeneous": True, "slurm__partition": "x", "slurm__continue_by": "array"},
        ["slurm.continue_by = 'array'", "heterogeneous"],
    ),
    "jobs": ({"slurm__jobs": 2}, ["slurm.jobs = 2", "continue_by"]),
    "no image": ({"slurm__container": "pyxis"}, ["slurm.container = 'pyxis'", "slurm.image"]),
    "no runtime": ({"slurm__image": "x.sif"}, ["slurm.image = 'x.sif'", "slurm.container"]),
    "runtime": ({"slurm__container": "docker"}, ["slurm.container = 'docker'", "pyxis", "apptainer"]),
    "grace": ({"launch__grace_seconds": 700.0}, ["checkpoint_seconds = 600", "grace_seconds = 700"]),
    "time": ({"slurm__time_limit": "10"}, ["slurm.time_limit = '10'", "checkpoint_seconds = 600"]),
    "no time": ({"slurm__time_limit": "soon"}, ["slurm.time_limit = 'soon'"]),
    "two words": ({"slurm__partition": "a b"}, ["slurm.partition = 'a b'", "one word"]),
    "option": ({"slurm__sbatch_options": ["reservation"]}, ["'reservation'", "--reservation=npd"]),
    "unknown key": ({"slurm__nodes": 3}, ["slurm.nodes", "did you mean"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(configured: SetConfig, fault: str) -> None:
    options, words = REFUSED[fault]
    with pytest.raises(UserError) as refusal:
        render(configured(**options), "run.toml", [])
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_slurm_options_do_not_identify_a_run(configured: SetConfig) -> None:
    assert configured(slurm__sidecars=7, slurm__partition="x").digest == configured().digest


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("30", 1800), ("30:10", 1810), ("2:00:00", 7200), ("1-12", 129600), ("1-12:30", 131400), ("1-00:00:05", 86405)],
)
def test_time_limits(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


def test_the_command_shows_writes_and_refuses(
    configured: SetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured()
    config, script = str(tmp_path / "run.toml"), tmp_path / "job.sh"
    assert main(["slurm", config, "--set", "slurm.sidecars=3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/usr/bin/env bash\n") and "SETTINGS=(--set slurm.sidecars=3" in shown
    assert main(["slurm", config, "--set", "slurm.sidecars=3", "--output", str(script)]) == 0
    assert script.read_text() == shown
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["slurm", config, "--submit", "--no-check"]) == 2
    assert capsys.readouterr().err == (
        "npd: error: sbatch: not on the PATH; render the script here and submit it on a login node\n"
    )
    assert main(["slurm", config, "--submit"]) == 2, "the check comes first"
    assert "models.teacher = t: no such folder" in capsys.readouterr().err


TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURMD_NODENAME": "n3",
}
ALL_GPUS = TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def test_a_trainer_rank_of_a_step(configured: SetConfig) -> None:
    config = configured(training__data_parallel_size=8, slurm__network_interface="lo")
    env = task_environment(config, "trainer", "4-7", ALL_GPUS)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("5", "8", "1")
    assert env["CUDA_VISIBLE_DEVICES"] == "4,5,6,7", "local rank 1 is GPU 5 of the node, its second"
    assert env["NPD_ADDRESS_FILE"].endswith("runs/a/rendezvous/trainer.7.2.0")
    assert env["NPD_ADDRESS"] == "127.0.0.1"
    assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "lo"
    again = task_environment(config, "trainer", "4-7", ALL_GPUS | {"SLURM_RESTART_COUNT": "1"})
    assert again["NPD_ADDRESS_FILE"].endswith("trainer.7.2.1"), "a requeued job counts its steps from 0 again"


def test_several_annotators_of_a_step_do_not_meet(configured: SetConfig) -> None:
    config = configured(annotator__tensor_model_parallel_size=2)
    ranks = [
        task_environment(config, "annotator", "0-3", ALL_GPUS | {"SLURM_LOCALID": str(local)}) for local in range(4)
    ]
    assert [(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) for env in ranks] == [
        ("0", "2", "0"),
        ("1", "2", "1"),
        ("0", "2", "2"),
        ("1", "2", "3"),
    ]
    files = [Path(env["NPD_ADDRESS_FILE"]).name for env in ranks]
    assert files == ["annotator.n3.0.7.2.0"] * 2 + ["annotator.n3.1.7.2.0"] * 2
    assert all(env["GLOO_SOCKET_IFNAME"] == "lo" and env["NPD_ADDRESS"] == "127.0.0.1" for env in ranks)
    assert len({env["NPD_INSTANCE"] for env in ranks}) == 4


def test_sidecars_of_a_step_share_its_gpus(configured: SetConfig) -> None:
    config = configured(rollout__tensor_model_parallel_size=2)
    named = TASK | {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c,GPU-d,GPU-e,GPU-f"}
    shares = [
        task_environment(config, "rollout", "2-5", named | {"SLURM_LOCALID": str(local)})["CUDA_VISIBLE_DEVICES"]
        for local in range(2)
    ]
    assert shares == ["GPU-c,GPU-d", "GPU-e,GPU-f"]
    assert task_environment(config, "rollout", "2-5", TASK)["CUDA_VISIBLE_DEVICES"] == "4,5", "Slurm names no GPUs"
    assert "CUDA_VISIBLE_DEVICES" not in task_environment(config, "rollout", "none", TASK)


@pytest.mark.parametrize(
    ("role", "devices", "changes", "words"),
    [
        ("trainer", "0-7", {"SLURM_PROCID": None}, ["--slurm 0-7", "srun"]),
        ("trainer", "0-7", {"SLURM_NTASKS": "3"}, ["SLURM_NTASKS = 3", "must be 8"]),
        ("trainer", "0", {}, ["--slurm 0", "1 GPUs"]),
        ("trainer", "4-7", {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ["node n3 shows 4 GPUs", "4-7", "gpus_per_node"]),
        ("trainer", "all", {}, ["--slurm all", "0-3"]),
        ("rollout", "0-1", {"SLURM_LOCALID": "2"}, ["--slurm 0-1", "sidecar 2"]),
    ],
)
def test_a_step_that_does_not_fit_is_refused(
    configured: SetConfig, role: str, devices: str, changes: dict[str, str | None], words: list[str]
) -> None:
    config = configured(training__data_parallel_size=8, slurm__network_interface="lo")
    environ = {name: value for name, value in (ALL_GPUS | changes).items() if value is not None}
    with pytest.raises(UserError) as refusal:
        task_environment(config, role, devices, environ)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_the_address_of_an_interface() -> None:
    assert own_address("lo", several_nodes=False) == "127.0.0.1"
    with pytest.raises(UserError, match=r"slurm.network_interface = 'ib9'"):
        own_address("ib9", several_nodes=True)


def test_steps_of_a_command_line() -> None:
    words = ["--step", "trainer", "srun", "-n2", "npd", "trainer", "--step", "annotator.node1", "srun", "a"]
    steps = parse_steps([*words, "--step", "rollout.node1", "srun", "b"])
    assert [(step.name, step.kind, step.argv) for step in steps] == [
        ("trainer", "trainer", ["srun", "-n2", "npd", "trainer"]),
        ("annotator.node1", "annotator", ["srun", "a"]),
        ("rollout.node1", "rollout", ["srun", "b"]),
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["srun"], "srun: must be --step NAME COMMAND"),
        (["--step", "trainer", "--step", "annotator", "a"], "--step trainer: no command"),
        (["--step", "boss", "a"], "--step boss: must be called trainer, annotator, rollout"),
        (["--step", "trainer", "a", "--step", "trainer", "b"], "--step trainer: named twice"),
        (["--step", "trainer", "a", "--step", "annotator", "b"], "--step rollout: missing"),
    ],
)
def test_steps_that_cannot_finish_a_run_are_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_steps(words)
