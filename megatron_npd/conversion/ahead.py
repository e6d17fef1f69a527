"""Reading the next tensor while the last one is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Gives values by name, in a known order; a thread computes the next one while the last one is used."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], T]):
        self._compute = compute
        self._names = iter(names)
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._next: tuple[str, Future[T]] | None = None

    def __call__(self, name: str) -> T:
        """The value of `name`, which must be the next in order."""
        if self._next is None:
            self._start()
        assert self._next and self._next[0] == name, f"{name} is not the next"
        value = self._next[1].result()
        self._next = None
        self._start()
        return value

    def _start(self) -> None:
        name = next(self._names, None)
        if name is not None:
            self._next = name, self._thread.submit(self._compute, name)
