"""What a person reads while a run goes on is whole: no line ends in the middle of a word."""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from inputs import Inputs
from signs import leave_sign

from megatron_npd.buffer.plan import make_plan
from megatron_npd.files import write_atomically
from megatron_npd.run_directory import RunDirectory
from megatron_npd.supervise.console import Console, fitted
from megatron_npd.supervise.journal import Journal
from megatron_npd.supervise.progress import Progress

LINE = "npd: round_0000: 1/3 units rolled out | step 3 | trainer: waiting for its turn to compute since 12:00:00"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (200, LINE),
        (len(LINE), LINE),
        (len(LINE) - 1, "npd: round_0000: 1/3 units rolled out | step 3 | …"),
        (47, "npd: round_0000: 1/3 units rolled out | …"),
        (38, "npd: round_0000: 1/3 units rolled out"),
        (30, "npd: round_0000: 1/3 units …"),
        (4, "…"),
        (0, ""),
    ],
)
def test_a_live_line_ends_with_a_whole_word(width: int, shown: str) -> None:
    assert fitted(LINE, width) == shown


def test_a_line_is_narrowed_on_a_terminal_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "48")
    told = LINE.removeprefix("npd: ")
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        Console(tmp_path / "supervisor.log", stream).progress(told)
    assert terminal.getvalue() == "\r\x1b[Knpd: round_0000: 1/3 units rolled out | …"
    assert file.getvalue() == f"{LINE}\n"
    assert (tmp_path / "supervisor.log").read_text().endswith(f"INFO {told}\n")


def test_progress_says_whole_what_each_role_does_and_who_works_first(inputs: Inputs) -> None:
    directory = RunDirectory(inputs.run)
    write_atomically(directory.config, b"")
    what = "generating a stage with a name that is longer than any that a plan has, unit 12,345 of 67,890"
    for role, state, words in (("annotator", "waiting", "rollouts to annotate"), ("rollout", "working", what)):
        leave_sign(directory, role, socket.gethostname(), os.getpid(), state=state, what=words, since=0.0)
    progress = Progress(directory, make_plan(inputs.config, 6, 3), Journal(directory))
    child = SimpleNamespace(pid=os.getpid(), command=SimpleNamespace(name="rollout"))
    since = time.strftime("%H:%M:%S", time.localtime(0))
    _, *doing = progress.describe([child]).split(" | ")
    assert doing == [f"rollout: {what}", f"annotator: waiting for rollouts to annotate since {since}"]
