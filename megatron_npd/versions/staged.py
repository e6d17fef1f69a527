"""Deciding whether a published version may replace the one being served, before anything is changed. No vLLM.

vLLM itself accepts a checkpoint with a tensor missing, and is left unusable by one of a wrong shape: so a version is
compared here in full, what its manifest says first, and its content as it is read into this host's memory. Weights are
then loaded from there: no fault of the files, or of whoever writes them, can come between.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_npd.errors import BadVersionError, UserError
from megatron_npd.models.hf_config import ModelDims, model_dims
from megatron_npd.versions.host_copy import CONFIG, HostCopy
from megatron_npd.versions.manifest import (
    PARITY,
    ParityProbe,
    VersionManifest,
    read_manifest,
    require_version,
)


@dataclass(frozen=True)
class ServedVersion:
    """What a policy version is, as far as another must be like it."""

    version: int
    dims: ModelDims
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Name -> (safetensors dtype, shape)."""


@dataclass(frozen=True)
class StagedVersion:
    """A verified version in this host's memory, ready to be loaded. A context manager: leaving it frees the memory."""

    served: ServedVersion
    """What is served once it is loaded."""
    copy: HostCopy
    probe: ParityProbe
    seconds: float
    """How long reading and verifying it took."""

    @property
    def version(self) -> int:
        return self.served.version

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.copy.close()


def stage_version(served: ServedVersion, folder: Path, version: int) -> StagedVersion:
    """Read the version in `folder` into memory and verify that it can replace the served one.

    Raises:
        BadVersionError: it is not newer, fails verification, or differs from the served one in any tensor's name,
            shape or dtype or in the model's dimensions; the text names the file or tensor.
        MemoryError: it does not fit beside what is there.
    """
    started = time.monotonic()
    require_newer(served, folder, version)
    manifest = read_manifest(folder)
    require_version(folder, manifest, version)
    _require_same_tensors(folder, served, manifest)
    if not {CONFIG, PARITY} <= manifest.files.keys():
        raise BadVersionError(f"{folder}: the manifest must list {CONFIG} and {PARITY}")
    copy = HostCopy(folder, manifest)
    try:
        dims = _same_dims(folder, served, copy)
        probe = ParityProbe(**copy.read_json(PARITY))
    except BaseException:
        copy.close()
        raise
    return StagedVersion(ServedVersion(version, dims, manifest.tensors), copy, probe, time.monotonic() - started)


def require_newer(served: ServedVersion, what: Path | str, version: int) -> None:
    """Raises `BadVersionError` unless `version` is newer than the served one."""
    if version <= served.version:
        raise BadVersionError(f"{what}: version {version} is not newer than version {served.version}, which is served")


def _require_same_tensors(folder: Path, served: ServedVersion, new: VersionManifest) -> None:
    for name in sorted(served.tensors.keys() | new.tensors.keys()):
        if name not in new.tensors:
            raise BadVersionError(f"{folder}: tensor {name} is missing")
        if name not in served.tensors:
            raise BadVersionError(f"{folder}: tensor {name} is not in the served version {served.version}")
        if new.tensors[name] != served.tensors[name]:
            raise BadVersionError(
                f"{folder}: tensor {name} is {_describe(new.tensors[name])}, "
                f"must be {_describe(served.tensors[name])} as in the served version {served.version}"
            )


def _same_dims(folder: Path, served: ServedVersion, copy: HostCopy) -> ModelDims:
    """The new version's dimensions, which must be the served one's."""
    try:
        dims = model_dims(copy.read_json(CONFIG), str(folder / CONFIG))
    except UserError as error:
        raise BadVersionError(str(error)) from None
    old, new = asdict(served.dims), asdict(dims)
    for key in old:
        if new[key] != old[key]:
            raise BadVersionError(f"{folder / CONFIG}: {key} = {new[key]}, must be {old[key]} as served")
    return dims


def _describe(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]} {list(tensor[1])}"
