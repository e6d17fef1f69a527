"""The run directory: where every file of a run lies. A contract between roles; nobody else builds a path.

config.toml  provenance.json         resolved configuration; git commit, package versions, fingerprints of the inputs
prompts/{train,heldout}/             tokenised once, memory-mapped
prompts/evaluation/NAME/             the same of an evaluation's problems, with what its grader goes by
weights/v000003/                     a complete Hugging Face checkpoint of policy version 3
rollouts/STAGE/unit_000004.safetensors   responses, as generated
samples/STAGE/unit_000004.safetensors    the same, scored, judged and annotated
evaluation/v000003.json              held-out KL of version 3
evaluation/NAME/v000003.{json,jsonl}   what version 3 scored in an evaluation, and its answers; teacher.* of the teacher
leases/KIND/STAGE/unit_000004.json   who works on what
checkpoints/iter_0000120/            Megatron torch_dist checkpoint and run state; latest.txt names the current one
rendezvous/NAME                      where the ranks of one start under Slurm find each other; gone when they have
status/ROLE.RANK.HOST.PID.json       what each living process is doing (see `heartbeat`)
metrics/ROLE.jsonl  logs/ROLE.log  tensorboard/  summary.json  report.html
student_hf/  student_hf.json         the student that is handed over; which version it is, and by which score
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_npd.roles import TEACHER

HELDOUT_STAGE = "heldout"
WARMUP_STAGE = "warmup"

LATEST_CHECKPOINT = "latest.txt"
"""In checkpoints/: name of the current one."""
CHECKPOINT_STATE = "run_state.json"
"""In a checkpoint: where in the plan the run stands."""


def round_stage(index: int) -> str:
    """Name of a round's stage, e.g. round_0000."""
    return f"round_{index:04d}"


@dataclass(frozen=True)
class RunDirectory:
    """Paths below one root. Nothing is created here."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    def prompts(self, split: str) -> Path:
        """Folder of a tokenised prompt set, split `train` or `heldout`."""
        return self.root / "prompts" / split

    def problems(self, evaluation: str) -> Path:
        """Folder of the tokenised problems of an evaluation."""
        return self.prompts("evaluation") / evaluation

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    def version(self, version: int) -> Path:
        """Folder of a published policy version; it exists only when complete."""
        return self.weights / f"v{version:06d}"

    def stages(self, kind: str) -> Path:
        """Folder of all stages' shards; kind `rollouts` or `samples`."""
        return self.root / kind

    def stage(self, kind: str, stage: str) -> Path:
        """Folder of one stage's shards."""
        return self.stages(kind) / stage

    def unit(self, kind: str, stage: str, unit: int) -> Path:
        """Shard of one unit of work."""
        return self.stage(kind, stage) / f"unit_{unit:06d}.safetensors"

    @property
    def leases(self) -> Path:
        return self.root / "leases"

    def stage_leases(self, kind: str, stage: str) -> Path:
        """Folder of the leases of one stage's units."""
        return self.leases / kind / stage

    def lease(self, kind: str, stage: str, unit: int) -> Path:
        return self.stage_leases(kind, stage) / f"unit_{unit:06d}.json"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluation"

    def evaluation(self, version: int) -> Path:
        """Held-out figures of a published version."""
        return self.evaluations / f"v{version:06d}.json"

    def results(self, evaluation: str) -> Path:
        """Folder of what was scored in an evaluation."""
        return self.evaluations / evaluation

    def result(self, evaluation: str, version: int) -> Path:
        """What a version scored in an evaluation; of the teacher where it is TEACHER_VERSION. Its answers lie beside
        it, as .jsonl."""
        return self.results(evaluation) / f"{TEACHER if version < 0 else f'v{version:06d}'}.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def meeting(self, name: str) -> Path:
        """Where rank 0 of one start writes the address it listens on; `name` is that start's alone."""
        return self.root / "rendezvous" / name

    @property
    def metrics_folder(self) -> Path:
        return self.root / "metrics"

    def metrics(self, role: str) -> Path:
        return self.metrics_folder / f"{role}.jsonl"

    def log(self, role: str) -> Path:
        return self.root / "logs" / f"{role}.log"

    @property
    def status_folder(self) -> Path:
        return self.root / "status"

    def status(self, role: str, rank: int, host: str, pid: int) -> Path:
        """A process's sign of life."""
        return self.status_folder / f"{role}.{rank}.{host}.{pid}.json"

    @property
    def supervisor_lock(self) -> Path:
        """Held by the one supervisor that works here; names its process."""
        return self.root / "supervisor.lock"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def student(self) -> Path:
        """The finished student, a Hugging Face checkpoint."""
        return self.root / "student_hf"

    @property
    def handed_over(self) -> Path:
        """Which version the finished student is."""
        return self.root / "student_hf.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def turn(self) -> Path:
        """Lock file by which the roles of one machine take turns."""
        return self.root / "turn.lock"
