"""Publishing this model, from any parallel layout, as a complete Hugging Face checkpoint that appears atomically.

Training stands still while the parameters are gathered bucket by bucket, each to the one rank that will write it, and
copied to host memory (`weights.snapshot`). A thread a rank then writes and hashes them (`weights.share`), and rank 0's
makes the whole visible by one rename (`weights.completion`). Threads never communicate: the ranks agree on how it went
in `poll` and `wait`.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from megatron_npd.distributed.collectives import broadcast_object, gather_objects, greatest
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import STORAGE_ERRNOS, StorageError, UserError
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.process.waiting import explained
from megatron_npd.run_directory import RunDirectory
from megatron_npd.versions.manifest import ParityProbe
from megatron_npd.weights.buckets import LARGEST_BUCKET, SMALLEST_BUCKET
from megatron_npd.weights.completion import AlreadyPublishedError, Target, complete
from megatron_npd.weights.safetensors_writer import PlannedFile
from megatron_npd.weights.share import SHARES, Share, write_share
from megatron_npd.weights.snapshot import Snapshot

POLL_SECONDS = 0.01
GIVE_UP_SECONDS = 10.0
"""How long a failed publication waits for its own thread before it is reported."""


@dataclass(frozen=True)
class Published:
    """A version that became visible."""

    version: int
    bytes: int
    """Of all tensors."""
    seconds: float
    """From the moment training stopped for it until readers could see it."""
    stall_seconds: float
    """How long training stood still for it: copying, and waiting for the writing where that had to be."""


class Publisher:
    """Publishes one version at a time. Every rank makes one and calls its methods at the same places."""

    def __init__(
        self,
        run: RunDirectory,
        parameters: Mapping[str, torch.Tensor],
        dims: ModelDims,
        parallel: Parallel,
        template: str | Path,
        on_published: Callable[[Published], None] = lambda published: None,
        largest_bucket: int = LARGEST_BUCKET,
        smallest_bucket: int = SMALLEST_BUCKET,
    ):
        """
        Args:
            parameters: this rank's, as `mcore.model.named_parameters` gives them; here for their shapes only.
            template: checkpoint folder whose configuration, tokenizer and generation config are carried along.
            on_published: called on every rank, in `poll` or `wait`, when a version was found visible.
        """
        self.run, self.dims, self.parallel, self.template = run, dims, parallel, Path(template)
        self.on_published = on_published
        self.snapshot = Snapshot(parameters, dims, parallel, largest_bucket, smallest_bucket)
        self._dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
        self._files = _agree_on_files(self.snapshot, parallel)
        self._job: _Job | None = None

    def publish(
        self,
        version: int,
        parameters: Mapping[str, torch.Tensor],
        probe: ParityProbe | None = None,
        since: float | None = None,
    ) -> None:
        """Publish the parameters as they are now. Returns when they are copied; `poll` or `wait` find the version
        visible.

        Args:
            probe: from the logging rank; None on every other, or without one.
            since: `time.monotonic` when training stopped for this (for `Published`); None: now.

        Raises:
            UserError: the version is published already, the folder cannot be written, or an earlier publication failed.
        """
        self.wait()
        since = time.monotonic() if since is None else since
        target = self._open(version)
        self.snapshot.take(parameters)
        files = [(PlannedFile(self._files.name(copy.number), copy.bucket.tensors), copy.data) for copy in self.snapshot]
        share = Share(self.parallel.rank, files, probe)
        self._job = _Job(target, share, self._leads, since, time.monotonic() - since)
        self._job.start()

    def poll(self) -> bool:
        """Whether no version is under way. Costs a small collective while one is.

        Raises:
            UserError: on every rank, if a file could not be written on any. Nothing became visible.
        """
        if self._job is not None and self._is_visible(self._job):
            self._conclude(self._job)
        return self._job is None

    def wait(self) -> None:
        """Return when the version under way, if any, is visible; says so where that takes time. Raises as `poll`."""
        if self.poll():
            return
        job, started = self._job, time.monotonic()
        with explained(f"version {job.target.version} to be written") as still:
            while not self._is_visible(job):
                still()
                time.sleep(POLL_SECONDS)
        job.stall_seconds += time.monotonic() - started
        self._conclude(job)

    @property
    def _leads(self) -> bool:
        return self.parallel.rank == 0

    def _open(self, version: int) -> Target:
        """Make a folder to write to. Its name is used once: a writer thought dead cannot write into another's files."""
        final = self.run.version(version)
        staging = final.with_name(f".staging-{final.name}-{uuid.uuid4().hex[:8]}")
        refused = None
        if self._leads:
            if final.exists():
                refused = UserError(_already_published(final))
            else:
                try:
                    (staging / SHARES).mkdir(parents=True)
                except OSError as error:
                    refused = _cannot_write(error, final)
        if self.parallel.world_size > 1:
            staging, refused = broadcast_object((staging, refused))
        if refused:
            raise refused
        return Target(
            version, staging, final, self.template, self.dims, self._dtype, self._files.bytes, self._files.writers
        )

    def _is_visible(self, job: _Job) -> bool:
        """Whether all ranks are done: a collective. Every rank raises if one has failed."""
        running = job.is_running  # looked at first: a thread that has ended has left its error
        running, failed, seconds = greatest((float(running), float(job.error is not None), job.seconds), self.parallel)
        if failed:
            self._give_up(job)
        if not running:
            job.seconds = seconds  # no thread writes it any more
        return not running

    def _conclude(self, job: _Job) -> None:
        self._job = None
        self.on_published(Published(job.target.version, self._files.bytes, job.seconds, job.stall_seconds))

    def _give_up(self, job: _Job) -> NoReturn:
        """Leave nothing half-written behind, and raise the first rank's reason on every rank."""
        self._job = None
        failures = [failure for failure in gather_objects(job.failure(), self.parallel) if failure]
        job.stop.set()
        job.join(GIVE_UP_SECONDS)
        if self._leads:
            shutil.rmtree(job.target.staging, ignore_errors=True)
        raise failures[0] from (None if isinstance(failures[0], UserError) else job.error)


class _Job:
    """One rank's thread, and what came of it."""

    def __init__(self, target: Target, share: Share, leads: bool, since: float, stall_seconds: float):
        self.target, self.share, self.leads, self.since = target, share, leads, since
        self.stall_seconds = stall_seconds
        self.seconds = 0.0
        """From `since` until the version was visible, on the first rank; 0 before and elsewhere."""
        self.error: BaseException | None = None
        self.stop = threading.Event()
        # A daemon: a trainer that was told to stop does not wait for it.
        self._thread = threading.Thread(target=self._run, name=f"publish v{target.version}", daemon=True)
        self.start, self.join = self._thread.start, self._thread.join

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def failure(self) -> Exception | None:
        """What to tell whoever waits for this publication, if it failed."""
        error, final = self.error, self.target.final
        if isinstance(error, AlreadyPublishedError) or (isinstance(error, OSError) and final.exists()):
            return UserError(_already_published(final))  # whoever was first removed this one's folder
        if isinstance(error, OSError):
            return _cannot_write(error, final)
        return RuntimeError(f"{final}: {error!r} while it was written") if error else None

    def _run(self) -> None:
        try:
            if self.share.rank in self.target.writers:
                write_share(self.target.staging, self.share)
            if self.leads:
                self.seconds = complete(self.target, self.stop) - self.since
        except BaseException as error:  # raised by the main thread, which looks at it
            self.error = error


@dataclass(frozen=True)
class _Files:
    """The files of a version, over all stages; the same for every version."""

    first: int
    """Number of this stage's first one, from 1."""
    count: int
    bytes: int
    """Of all tensors."""
    writers: list[int]
    """Ranks that write something."""

    def name(self, bucket: int) -> str:
        """Of this stage's bucket."""
        return f"model-{self.first + bucket:05d}-of-{self.count:05d}.safetensors"


def _agree_on_files(snapshot: Snapshot, parallel: Parallel) -> _Files:
    sizes = [bucket.nbytes for bucket in snapshot.plan]
    writes = any(True for _ in snapshot) or parallel.rank == parallel.logging_rank  # that one writes the parity probe
    told = gather_objects((parallel.pp_rank, sizes, writes), parallel)
    stages = {stage: sizes for stage, sizes, _ in told}
    return _Files(
        first=1 + sum(len(sizes) for stage, sizes in stages.items() if stage < parallel.pp_rank),
        count=sum(map(len, stages.values())),
        bytes=sum(map(sum, stages.values())),
        writers=[rank for rank, (_, _, writes) in enumerate(told) if writes],
    )


def _already_published(final: Path) -> str:
    return (
        f"{final}: is published already, and versions never change; if another trainer works in this run directory, "
        "stop one of them"
    )


def _cannot_write(error: OSError, final: Path) -> UserError:
    kind = StorageError if error.errno in STORAGE_ERRNOS else UserError
    return kind(
        f"{error.filename or final}: cannot write {final.name}: {error.strerror or error}; must be a writable folder "
        "with room for it (nothing was published, older versions stay)"
    )
