"""Micro-batches made while the device computes: those of the next step, in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_in_turn(make: Callable[[Item], Made], items: Iterable[Item], ahead: bool) -> Iterator[Made]:
    """`make(item)` for every item, in order. What it raises is raised where its result would have come.

    Args:
        ahead: begin the next one, in a thread, when one is handed over, so at most two exist. False: each when it is
            asked for. Where the CPU computes, a thread beside it would only take turns with it.
    """
    if not ahead:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        left = iter(items)

        def begin_next() -> Future[Made] | None:
            return next((pool.submit(make, item) for item in left), None)

        pending = begin_next()
        while pending:
            made = pending.result()
            pending = begin_next()
            yield made
