#!/usr/bin/env python3
"""Kill -9 random processes of a real run at random instants, then prove that nothing was lost, doubled or left over.

    python tools/chaos.py CONFIG --kills 50 [--seed 0] [--mean-seconds 10] [--set key=value ...] [--json FILE]
    python tools/chaos.py --tiny FOLDER --kills 50 ...

Victims are the supervisor, any rank of any role, and whatever these started (checkpoint writers). A killed supervisor
must take every process with it; `npd run` is then called again. Runs follow each other, each with another seed in a
folder of its own below the configuration's run_directory, until there were enough kills. At the end of each:

- every sample of the plan is in the buffer once, sampled by the version its round belongs to;
- the trainer alone, undisturbed, on a copy of the buffer, arrives at bit-identical weights of every version;
- no process is left.

--tiny makes two random checkpoints and prompts in FOLDER, by the tests' own helpers: some minutes on two cores.
Exit status: 0 all held, 1 something did not (one line each).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_npd.buffer.plan import plan_of
from megatron_npd.buffer.shards import CorruptShardError, read_shard
from megatron_npd.config import Config, load_config
from megatron_npd.files import read_json
from megatron_npd.run_directory import RunDirectory
from megatron_npd.versions.manifest import MANIFEST, published_versions

MARK = "NPD_CHAOS"
"""Environment variable that every process of one chaos run inherits: how its processes are told from all others."""
TAKEN_ALONG_SECONDS = 15.0
"""How long processes may outlive a killed supervisor."""
KINDS = ("supervisor", "trainer", "annotator", "rollout", "rollout_teacher", "child of a role")
PATIENCE_SECONDS = 10.0
"""How long a kill waits for a process of the kind that was chosen."""
SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"


@dataclass
class Outcome:
    """What happened, over all runs."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    samples: int = 0
    versions: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    arguments = _arguments()
    path = make_tiny(arguments.tiny) if arguments.tiny else arguments.config
    config = load_config(path, arguments.set)
    dice, outcome, root = random.Random(arguments.seed), Outcome(), Path(config.run_directory)
    while sum(outcome.kills.values()) < arguments.kills and not outcome.faults:
        one = config.model_copy(
            update={"run_directory": str(root / f"{outcome.runs:03d}"), "seed": config.seed + outcome.runs}
        )
        overrides = [*arguments.set, f"run_directory={one.run_directory}", f"seed={one.seed}"]
        left = arguments.kills - sum(outcome.kills.values())
        disturbed_run(path, overrides, dice, arguments.mean_seconds, left, outcome)
        if not outcome.faults:
            check_buffer(one, outcome)
            check_weights(one, outcome)
        outcome.runs += 1
    return conclude(outcome, arguments.json)


def disturbed_run(
    path: Path, overrides: list[str], dice: random.Random, mean_seconds: float, kills: int, outcome: Outcome
) -> None:
    """One run to its end, whatever it takes; processes of it are killed until there were enough."""
    mark = uuid.uuid4().hex
    supervisor = start(path, overrides, mark)
    aim = Aim(dice, mean_seconds)
    while True:
        if supervisor.poll() is not None:
            if supervisor.returncode == 0:
                break
            if supervisor.returncode != -signal.SIGKILL:
                outcome.faults.append(f"npd run gave up with status {supervisor.returncode}: see its log below {path}")
                break
            left = wait_until_gone(mark)
            if left:
                outcome.faults.append(f"outlived the killed supervisor by {TAKEN_ALONG_SECONDS} s: {left}")
                break
            supervisor = start(path, overrides, mark)
        if kills and (victim := aim.victim(mark)):
            pid, name = victim
            aim = Aim(dice, mean_seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                outcome.kills[name] += 1
                kills -= 1
                print(f"killed {name} ({pid}); {kills} to go", flush=True)
        time.sleep(0.05)
    if left := wait_until_gone(mark):
        outcome.faults.append(f"left over at the end: {left}")
        for pid, _ in processes(mark):
            os.kill(pid, signal.SIGKILL)


def start(path: Path, overrides: list[str], mark: str) -> subprocess.Popen[bytes]:
    """`npd run`, in a session of its own: a signal to this terminal is not a disturbance we count."""
    sets = [argument for override in overrides for argument in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_npd.cli", "run", str(path), *sets],
        env=os.environ | {MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


class Aim:
    """The next victim: a kind of process, and an instant. Chosen beforehand, or else the supervisor, which is always
    there, would be hit most while the roles start."""

    def __init__(self, dice: random.Random, mean_seconds: float):
        self._dice = dice
        self._kind = dice.choice(KINDS)
        self._after = time.monotonic() + dice.expovariate(1.0 / mean_seconds)
        self._until = self._after + PATIENCE_SECONDS

    def victim(self, mark: str) -> tuple[int, str] | None:
        """(pid, kind) once it is time and there is one; another kind's when none of this comes."""
        now = time.monotonic()
        if now < self._after:
            return None
        living = sorted(processes(mark))
        return self._dice.choice([one for one in living if one[1] == self._kind or now > self._until] or [None])


def processes(mark: str) -> Iterator[tuple[int, str]]:
    """(pid, kind) of every living process of a run: supervisor, a role, or `child of` one."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            ours = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (OSError, IndexError):
            continue  # gone meanwhile, or not ours to look at
        if ours and not dead:
            yield int(entry.name), _kind(command)


def _kind(command: list[str]) -> str:
    if "megatron_npd.cli" not in command:
        return "child of a role"
    name = command[command.index("megatron_npd.cli") + 1]
    return {"run": "supervisor"}.get(name, "rollout_teacher" if "teacher" in command else name)


def wait_until_gone(mark: str) -> list[tuple[int, str]]:
    """The processes of a run that are still there after a while."""
    deadline = time.monotonic() + TAKEN_ALONG_SECONDS
    while (left := list(processes(mark))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def check_buffer(config: Config, outcome: Outcome) -> None:
    """Every sample of the plan is there once, as its stage wants it."""
    run = RunDirectory(Path(config.run_directory))
    plan = plan_of(run, config)
    for stage in plan.training_stages:
        found: Counter[tuple[int, int]] = Counter()
        for unit in range(stage.units):
            try:
                shard = read_shard(run.unit("samples", stage.name, unit), "samples")
            except (OSError, CorruptShardError) as error:
                outcome.faults.append(f"{stage.name} unit {unit}: {error}")
                continue
            found.update(zip(shard["prompt_index"].tolist(), shard["sample_index"].tolist(), strict=True))
            if set(shard["policy_version"].tolist()) != {stage.version_of(unit)}:
                outcome.faults.append(f"{stage.name} unit {unit}: sampled by {set(shard['policy_version'].tolist())}")
        wanted = Counter(zip(stage.prompt_index.tolist(), stage.sample_index.tolist(), strict=True))
        if found != wanted:
            outcome.faults.append(f"{stage.name}: lost {wanted - found}, doubled {found - wanted}")
        outcome.samples += sum(found.values())


def check_weights(config: Config, outcome: Outcome) -> None:
    """The trainer alone, on a copy of the buffer, makes the same weights: nothing was trained on twice or left out."""
    original = RunDirectory(Path(config.run_directory))
    copy = RunDirectory(original.root.with_name(original.root.name + "_again"))
    for name in ("prompts", "rollouts", "samples"):
        shutil.copytree(original.root / name, copy.root / name)
    for name in ("config.toml", "provenance.json"):
        shutil.copy(original.root / name, copy.root / name)
    ranks = []
    for rank in range(config.training.world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(config.training.world_size),
            "NPD_RENDEZVOUS": str(copy.root / "rendezvous"),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": str(config.training.threads),
        }
        command = [sys.executable, "-m", "megatron_npd.cli", "trainer", str(copy.config)]
        with open(copy.root / f"trainer_{rank}.log", "wb") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    statuses = [process.wait() for process in ranks]
    if any(statuses):
        outcome.faults.append(f"the undisturbed trainer failed: see {copy.root}")
        return
    versions = published_versions(copy)
    for version in versions:
        ours, theirs = (weight_checksums(run.version(version)) for run in (original, copy))
        if ours != theirs:
            outcome.faults.append(f"{original.root}: version {version} differs from the undisturbed trainer's")
    if versions != published_versions(original):
        outcome.faults.append(f"versions {published_versions(original)}, undisturbed {versions}")
    outcome.versions += len(versions)
    if not outcome.faults:
        shutil.rmtree(copy.root)


def weight_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file of a version, from its manifest."""
    files = read_json(folder / MANIFEST)["files"]
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def conclude(outcome: Outcome, path: Path | None) -> int:
    """Say what happened; returns the exit status."""
    kills = ", ".join(f"{name} {count}" for name, count in sorted(outcome.kills.items()))
    print(f"{sum(outcome.kills.values())} kills in {outcome.runs} runs: {kills}")
    print(f"{outcome.samples} samples, each once; {outcome.versions} versions compared with an undisturbed trainer")
    for fault in outcome.faults:
        print(f"FAULT: {fault}")
    if path:
        path.write_text(json.dumps(vars(outcome), indent=2))
    return 1 if outcome.faults else 0


def make_tiny(folder: Path) -> Path:
    """Two random checkpoints of one tokenizer, prompts, and a configuration with many short units; returns its path."""
    sys.path.insert(0, str(SUPPORT))
    from inputs import Inputs, write_prompts
    from tiny_models import make_llama
    from tiny_tokenizer import make_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, layers) in enumerate({"teacher": 2, "student": 1}.items()):
        make_llama(folder / name, seed, num_hidden_layers=layers)
        make_tokenizer(folder / name)
    inputs = Inputs(folder.resolve())
    write_prompts(inputs.train, {f"t{i}": f"What is {i} plus {i}?" for i in range(24)})
    inputs.set("warmup", {"samples_per_prompt": 1, "epochs": 2, "lr": 1e-2})
    inputs.set("rounds", {"count": 2, "epochs_per_round": 2})
    inputs.set("rollout", {"max_new_tokens": 24, "samples_per_unit": 6, "kv_cache_gib": 0.05, "threads": 1})
    inputs.set("selection", {"reject_truncated": False})  # random models rarely end by themselves
    inputs.set("training.tensor_model_parallel_size", 2)
    inputs.set("training.sequence_parallel", True)
    inputs.set("training.global_batch_size", 2)
    inputs.set("training.checkpoint_interval", 2)
    inputs.set("training.lr", 3e-3)
    inputs.set("training.min_lr", 3e-4)
    inputs.set("launch", {"lease_seconds": 10.0})
    return inputs.path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG")
    parser.add_argument("--tiny", type=Path, metavar="FOLDER")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean-seconds", type=float, default=10.0, help="between kills, exponentially distributed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.config is None) == (arguments.tiny is None):
        parser.error("one of CONFIG and --tiny FOLDER")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
