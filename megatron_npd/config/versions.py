"""Which published versions something is done for."""

from __future__ import annotations

from typing import Literal

VersionChoice = Literal["each", "ends", "last"] | list[int]
"""each; ends: where the student starts, where the rounds start, and the last; last; or these numbers, and the last."""


def chosen_versions(choice: VersionChoice, first_of_rounds: int, last: int) -> frozenset[int]:
    """The versions that are meant, of 0 to `last`."""
    if choice == "each":
        return frozenset(range(last + 1))
    numbers = {"ends": [0, first_of_rounds], "last": []}[choice] if isinstance(choice, str) else choice
    return frozenset([*numbers, last])


def refuse_unknown_versions(key: str, choice: VersionChoice, last: int) -> None:
    """A run has the versions 0 to `last`.

    Raises:
        ValueError: a number is not among them, or comes twice.
    """
    numbers = [] if isinstance(choice, str) else choice
    for number in numbers:
        if not 0 <= number <= last:
            raise ValueError(f"{key} = {choice}: {number} is no version of this run, which has 0 to {last}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{key} = {choice}: names a version twice")
