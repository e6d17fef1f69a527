"""Stopping a process at any system call it makes: kill -9 there, and see what lies on the disk (Linux, ptrace)."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_TRACESYSGOOD, _EXITKILL = 0x1, 0x100000
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_LIBC.ptrace.restype = ctypes.c_long


def killed_at(stop: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process and kill it at its `stop`-th system-call stop, counted from 0.

    Each call has two stops: before the kernel does it and after. The action must not depend on threads of this
    process. Returns False if it ended before it made so many.
    """
    child = os.fork()
    if child == 0:
        try:
            _ptrace(_TRACEME, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            action()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    _ptrace(_SETOPTIONS, child, _TRACESYSGOOD | _EXITKILL)
    seen = 0
    while True:
        _ptrace(_SYSCALL, child, 0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            return False
        if os.WSTOPSIG(status) == _SYSCALL_STOP:
            if seen == stop:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True
            seen += 1


def _ptrace(request: int, pid: int, data: int) -> None:
    if _LIBC.ptrace(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
