"""Which tests need neither torch nor transformers, nor what draws: the tier that takes seconds.

Found, not listed: a test file belongs to it if importing it imports none of these, and a test of it unless it asks for
a fixture that does, or says by a marker that it does so itself. A test that imports one all the same fails.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import pytest
from places import ROOT, SUPPORT

HEAVY = frozenset({"torch", "transformers", "vllm", "megatron", "matplotlib", "safetensors.torch", "accelerate"})
HEAVY_FIXTURES = frozenset({"checkpoints", "inputs", "parallel", "engines_live_on"})
MARKERS = ("slow", "heavy")
IMPORT = re.compile(r"^(?:from (\S+) import ([^\n(]+|\([^)]*\))|import (\S+))", re.MULTILINE)


def is_quick_file(path: Path) -> bool:
    """Whether importing a test file imports nothing heavy. Imports inside functions do not run then."""
    return path.name == "conftest.py" or not _imports_heavily(path)


def is_quick(item: pytest.Item) -> bool:
    """Whether a test of such a file needs nothing heavy."""
    fixtures = set(getattr(item, "fixturenames", ()))
    return not fixtures & HEAVY_FIXTURES and not any(item.get_closest_marker(name) for name in MARKERS)


def imported_heavily() -> list[str]:
    """What this process has imported of what a quick test must not."""
    return sorted(HEAVY & sys.modules.keys())


def _imports_heavily(path: Path) -> bool:
    """Whether importing a file runs an import of something heavy, its own or one of this checkout's files."""
    seen, to_read = {path}, [path]
    while to_read:
        names = _names(to_read.pop())
        if any(_heads(name) & HEAVY for name in names):
            return True
        found = {file for name in names for file in _ours(name)} - seen
        seen |= found
        to_read += found
    return False


@functools.cache
def _names(path: Path) -> tuple[str, ...]:
    """Dotted names that a file imports when it is imported: its statements that are not indented."""
    names: list[str] = []
    for module, members, plain in IMPORT.findall(path.read_text(encoding="utf-8")):
        names += [plain] if plain else [f"{module}.{name.split()[0]}" for name in members.strip("()\n, ").split(",")]
    return tuple(names)


@functools.cache
def _heads(name: str) -> frozenset[str]:
    """a.b.c: a, a.b and a.b.c."""
    parts = name.split(".")
    return frozenset(".".join(parts[:length]) for length in range(1, len(parts) + 1))


@functools.cache
def _ours(name: str) -> tuple[Path, ...]:
    """The files of this checkout that an import runs: packages on the way, and the module."""
    root = ROOT if name.startswith("megatron_npd") else SUPPORT
    places = [root.joinpath(*head.split(".")) for head in _heads(name)]
    return tuple(file for at in places for file in (at / "__init__.py", at.with_suffix(".py")) if file.is_file())
