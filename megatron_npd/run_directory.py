"""The run directory: where every file of a run lies. A contract between roles; nobody else builds a path.

config.toml  provenance.json         resolved configuration; git commit and package versions
prompts/{train,heldout}/             tokenised once, memory-mapped
weights/v000003/                     a complete Hugging Face checkpoint of policy version 3
rollouts/STAGE/unit_000004.safetensors   responses, as generated
samples/STAGE/unit_000004.safetensors    the same, scored, judged and annotated
evaluation/v000003.json              held-out KL of version 3
leases/KIND/STAGE/unit_000004.json   who works on what
checkpoints/iter_0000120/            Megatron torch_dist checkpoint and run state; latest.txt names the current one
rendezvous/NAME                      where the ranks of one start under Slurm find each other; gone when they have
status/ROLE.RANK.HOST.PID.json       what each living process is doing (see `heartbeat`)
metrics/ROLE.jsonl  logs/ROLE.log  tensorboard/  student_hf/  summary.json  report.html
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELDOUT_STAGE = "heldout"
WARMUP_STAGE = "warmup"

LATEST_CHECKPOINT = "latest.txt"
"""In checkpoints/: name of the current one."""
CHECKPOINT_STATE = "run_state.json"
"""In a checkpoint: where in the plan the run stands."""

_PROBE_BYTES = 1 << 20


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

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    def version(self, version: int) -> Path:
        """Folder of a published policy version; it exists only when complete."""
        return self.weights / f"v{version:06d}"

    def unit(self, kind: str, stage: str, unit: int) -> Path:
        """Shard of one unit of work; kind `rollouts` or `samples`."""
        return self.root / kind / stage / f"unit_{unit:06d}.safetensors"

    def lease(self, kind: str, stage: str, unit: int) -> Path:
        return self.root / "leases" / kind / stage / f"unit_{unit:06d}.json"

    def evaluation(self, version: int) -> Path:
        """Held-out figures of a published version."""
        return self.root / "evaluation" / f"v{version:06d}.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def meeting(self, name: str) -> Path:
        """Where rank 0 of one start writes the address it listens on; `name` is that start's alone."""
        return self.root / "rendezvous" / name

    def metrics(self, role: str) -> Path:
        return self.root / "metrics" / f"{role}.jsonl"

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
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def turn(self) -> Path:
        """Lock file by which the roles of one machine take turns."""
        return self.root / "turn.lock"


def fsync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, replacing one that is there: temporary name, fsync, rename,
    fsync of the folder."""
    with _temporary_file(path, lambda temporary: temporary.write_bytes(content)) as temporary:
        os.rename(temporary, path)
    fsync_folder(path.parent)


def create_atomically(path: Path, write: Callable[[Path], object]) -> bool:
    """Like `write_atomically`, but a file that is there stays as it is: then False, and nothing was written.

    `write` fills the file of the path it is given. A hard link appears at once and never replaces. Where the filesystem
    has none, two writers at the very same moment may both succeed, and the file of the later one stays.
    """
    with _temporary_file(path, write) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS may have done it, lost its answer, and been asked again.
            created = os.path.samefile(temporary, path)
        except OSError:
            created = not path.exists()
            if created:
                os.rename(temporary, path)
        else:
            created = True
    if created:
        fsync_folder(path.parent)
    return created


@contextlib.contextmanager
def _temporary_file(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """A durable file beside `path`, which must be renamed or linked within the block: what is left of it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "rb") as file:
            os.fchmod(file.fileno(), 0o644)
            write(Path(name))
            os.fsync(file.fileno())
        yield Path(name)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk alone does not tell which
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def probe_writing(folder: Path) -> None:
    """Write a little into a folder and take it away again.

    Raises:
        OSError: why nothing can be written there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        error.filename = str(folder)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, human-readable."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
