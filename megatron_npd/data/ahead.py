"""Making the next thing while the last one is used: the next tensor of a conversion, the next step's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Ahead(Generic[Key, Value]):
    """Gives values by key, in a known order; a thread computes the next one while the last one is used.

    Nothing is computed before the first is asked for, and at most one that nobody asked for yet exists. What computing
    one raises, asking for it raises.
    """

    def __init__(self, keys: Iterable[Key], compute: Callable[[Key], Value]):
        self._compute = compute
        self._keys = iter(keys)
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._next: tuple[Key, Future[Value]] | None = None

    def __call__(self, key: Key) -> Value:
        """The value of `key`, which must be the next in order."""
        if self._next is None:
            self._start()
        assert self._next and self._next[0] == key, f"{key} is not the next"
        value = self._next[1].result()
        self._next = None
        self._start()
        return value

    def _start(self) -> None:
        for key in self._keys:
            self._next = key, self._thread.submit(self._compute, key)
            return
