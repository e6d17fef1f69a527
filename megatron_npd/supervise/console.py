"""What the supervisor tells: lines that stay, and one live line where a person watches.

That nobody can be told, because the terminal is gone or the disk is full, must not end a run.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import TextIO

PART = " | "
"""Between the parts of a progress line."""
LIVE_SECONDS, PLAIN_SECONDS = 0.5, 10.0
_ERASE_LINE = "\r\x1b[K"


class Console:
    """Writes to stderr, and what stays also to a log with the time."""

    def __init__(self, log: Path, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._log = log
        self._live = self._stream.isatty()
        self._shown = ""
        self._next = 0.0

    def say(self, text: str) -> None:
        """Print lines that stay."""
        self._clear()
        lines = text.splitlines()
        self._print("".join(f"npd: {line}\n" for line in lines))
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with open(self._log, "a", encoding="utf-8") as log:
                log.write("".join(f"{stamp} INFO {line}\n" for line in lines))

    @property
    def wants_progress(self) -> bool:
        """Whether it is time for `progress`; composing it costs a look at the filesystem."""
        return time.monotonic() >= self._next

    def progress(self, text: str) -> None:
        """Show the state of things: in place on a terminal, as far as it is wide; else whole, whenever it changed.

        `text`: parts with `PART` between them, the most important first.
        """
        self._next = time.monotonic() + (LIVE_SECONDS if self._live else PLAIN_SECONDS)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._print(_ERASE_LINE + fitted(f"npd: {text}", width))
        elif text != self._shown:
            self.say(text)
        self._shown = text

    def _clear(self) -> None:
        if self._live and self._shown:
            self._print(_ERASE_LINE)
            self._shown = ""

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


def fitted(text: str, width: int) -> str:
    """As many whole parts of a line as fit, the first ones; if none does, whole words of the first. `…` is the rest."""
    if len(text) <= width:
        return text
    parts = text.split(PART)
    for count in range(len(parts) - 1, 0, -1):
        shorter = PART.join([*parts[:count], "…"])
        if len(shorter) <= width:
            return shorter
    return textwrap.shorten(parts[0], width, placeholder=" …") if width > 1 else ""
