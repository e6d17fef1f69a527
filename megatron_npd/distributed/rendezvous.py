"""How the ranks of one start find each other: a file they share, a socket whose address lies in a file, or torchrun's.

A file alone needs locks that reach every host, which not every cluster's filesystem has. So ranks on several hosts meet
at a socket of rank 0: at a port the kernel chose, on the one address it was told. It writes that address into a file of
this very start.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_npd.files import write_atomically

FILE = "NPD_RENDEZVOUS"
"""Environment variable: path of a file all ranks of one start share; they are on one host."""
ADDRESS_FILE = "NPD_ADDRESS_FILE"
"""Environment variable: path of a file that rank 0 of this start writes, and that does not exist before."""
ADDRESS = "NPD_ADDRESS"
"""Environment variable: IPv4 address rank 0 listens on, if ADDRESS_FILE is set."""
POLL_SECONDS = 0.1


def meeting_place(rank: int, world_size: int, timeout: timedelta) -> dict[str, Any]:
    """Arguments of `init_process_group` that say how the ranks find each other.

    Raises:
        ValueError: there are several ranks and no variable says where they meet.
        TimeoutError: rank 0 did not say where it listens.
    """
    if FILE in os.environ:
        return {"init_method": f"file://{Path(os.environ[FILE]).resolve()}"}
    if world_size == 1:
        return {"store": dist.HashStore()}  # alone: nobody to meet
    if ADDRESS_FILE in os.environ:
        return {"store": _socket_store(rank, world_size, Path(os.environ[ADDRESS_FILE]), timeout)}
    if "MASTER_ADDR" in os.environ:
        return {"init_method": "env://"}
    raise ValueError(f"WORLD_SIZE = {world_size}: needs {FILE}, {ADDRESS_FILE} or MASTER_ADDR to find the other ranks")


def leave_meeting_place(rank: int) -> None:
    """Remove what only the ranks that have met by now needed."""
    if rank == 0 and ADDRESS_FILE in os.environ:
        Path(os.environ[ADDRESS_FILE]).unlink(missing_ok=True)


def _socket_store(rank: int, world_size: int, address_file: Path, timeout: timedelta) -> dist.TCPStore:
    if rank:
        host, port = _read_address(address_file, timeout)
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    listener = socket.create_server((os.environ[ADDRESS], 0), backlog=1024)
    host, port = listener.getsockname()
    store = dist.TCPStore(
        host, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    write_atomically(address_file, f"{host} {port}\n".encode())
    return store


def _read_address(address_file: Path, timeout: timedelta) -> tuple[str, int]:
    until = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            host, port = address_file.read_text().split()
            return host, int(port)
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"{address_file}: rank 0 did not write where it listens within {timeout.total_seconds():.0f} s")
