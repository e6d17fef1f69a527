"""Durable files: they appear whole or not at all, survive a power cut, and are named in every error."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

_PROBE_BYTES = 1 << 20


def fsync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(folder: Path, already: Collection[str] = ()) -> None:
    """Make a folder durable with all that is in it; `already`: names of files that are. Those cost nothing again."""
    for entry in folder.iterdir():
        if entry.is_dir():
            make_durable(entry)
        elif entry.name not in already:
            with open(entry, "rb") as stream:
                os.fsync(stream.fileno())
    fsync_folder(folder)


@contextlib.contextmanager
def with_file_name(path: Path) -> Iterator[None]:
    """Give errors of the system a file name where they have none: a full disk alone does not tell which."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, replacing one that is there: temporary name, fsync, rename,
    fsync of the folder."""
    fill_atomically(path, lambda temporary: temporary.write_bytes(content))


def fill_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write_atomically` of a file too large to hold in memory: `write` fills the file of the path it is given."""
    with _temporary_file(path, write) as temporary:
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
        with with_file_name(path), os.fdopen(descriptor, "rb") as file:
            os.fchmod(file.fileno(), 0o644)
            write(Path(name))
            os.fsync(file.fileno())
        with with_file_name(path):
            yield Path(name)
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
