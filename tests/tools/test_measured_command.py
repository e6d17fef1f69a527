"""A command run on behalf of a tool: signals, exit status, and what it took."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import ModuleType

import pytest
from places import TOOLS

pytestmark = pytest.mark.heavy  # the supervisor's signals come with much else


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("measured_command")


def test_a_signal_reaches_the_run_once(tool: ModuleType) -> None:
    """The child asks for it itself, and would count a second one."""
    program = (
        "import os, signal, sys, time\n"
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda number, _: got.append(number))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "sys.exit(10 + len(got))\n"
    )
    before = signal.getsignal(signal.SIGINT)
    assert tool.to_the_end([sys.executable, "-c", program]) == 11
    assert signal.getsignal(signal.SIGINT) is before
    assert tool.to_the_end([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


def test_it_is_measured(tool: ModuleType) -> None:
    environment = os.environ | {"WORD": "7"}
    done = tool.measured([sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['WORD']))"], environment)
    assert done.status == 7 and 0 < done.seconds < 60 and 0 <= done.cores_used_by_others <= (os.cpu_count() or 1) + 1
