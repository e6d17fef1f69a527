"""A published version in this host's memory: what was verified is what is loaded.

A version on a shared filesystem can vanish or be replaced between two looks at it, and a file held open or mapped can
still be overwritten in place. So each file is read once, hashed as it is read, and kept. The copy costs the host the
size of the weights for as long as a refresh takes; worker processes map it, they do not copy it again.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_npd.versions.manifest import PARITY, VersionManifest, check_content, descriptor_path

CONFIG = "config.json"


class HostCopy:
    """Weights, configuration and parity probe of one verified version. A context manager: leaving it frees the memory.

    Args:
        folder: the published version.
        manifest: its manifest.

    Raises:
        BadVersionError: the version is not what its manifest says; see `versions.verify_version`.
        MemoryError: the copy does not fit.
    """

    def __init__(self, folder: Path, manifest: VersionManifest):
        self._descriptors: dict[str, int] = {}
        try:
            for name in manifest.files:
                if name.endswith(".safetensors") or name in (CONFIG, PARITY):
                    self._descriptors[name] = os.memfd_create(name)
            check_content(folder, manifest, self._descriptors)
        except BaseException:
            self.close()
            raise

    @property
    def weights(self) -> list[Path]:
        """The safetensors files, as paths for this process and its children, while the copy is open."""
        return [descriptor_path(fd) for name, fd in sorted(self._descriptors.items()) if name.endswith(".safetensors")]

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.weights)

    def read_json(self, name: str) -> Any:
        """Content of a file that was copied; KeyError if the version has none of that name."""
        return json.loads(descriptor_path(self._descriptors[name]).read_bytes())

    def close(self) -> None:
        """Free the memory."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
