"""Partitioning items into packs of a fixed number of positions. Pure functions on numpy.

`pack` makes few packs (best fit). `pack_balanced` makes as few and of near-equal cost: attention is quadratic in the
length, so a pack of long samples takes longer than a full pack of short ones, and ranks wait for each other.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable

import numpy as np

SHARE_STEPS = 8
"""Fineness of the share of positions that `pack_balanced` places by cost: 1/8."""

SHARES_FOR_FEWER = (0.8, 0.6)
"""Shares tried with fewer packs than best fit's. That rarely succeeds (on 1 in 20 sets of samples that best fit left
above the lower bound, at whatever share), so it is not tried long."""

FEWER_IS_WORTH = 1e-3
"""Fewer packs than best fit's are looked for only where they might be fewer by this share."""


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Partition items into packs of at most `capacity`: best fit, longest first, ties by index.

    Deterministic in `lengths`. O(n log n).

    Raises:
        ValueError: an item is longer than the capacity.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"item {int(lengths.argmax())} has {int(lengths.max())} tokens, capacity is {capacity}")
    packs: list[list[int]] = []
    rooms = _Rooms([])
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        number, room = rooms.take(length) or (len(packs), capacity)
        if number == len(packs):
            packs.append([])
        packs[number].append(item)
        rooms.put(number, room - length)
    return packs


def pack_balanced(lengths: np.ndarray, capacity: int, costs: np.ndarray) -> list[list[int]]:
    """Partition items into as few packs of at most `capacity` as can be found, of near-equal summed cost.

    The number of packs lies between ceil(total / capacity) and best fit's. In it as large a share of all positions as
    leads to a packing is placed by cost: dearest item first, each on the cheapest pack that has room. Best fit places
    the rest, small items that matter little for the cost and much for the fill. With a share of nothing that is best
    fit itself, which is what remains where no share succeeds.

    Deterministic in its arguments, ties by index. O(n log n), as long as costs rise with the length.

    Args:
        lengths: int [n], positions of each item.
        costs: [n], not negative, in any unit.

    Raises:
        ValueError: an item is longer than the capacity.
    """
    lengths, costs = np.asarray(lengths), np.asarray(costs, dtype=np.float64)
    assert lengths.shape == costs.shape, f"{lengths.shape} lengths, {costs.shape} costs"
    best_fit = pack(lengths, capacity)
    total = int(lengths.sum())
    order = np.lexsort((-lengths, -costs))  # dearest first
    placed = np.cumsum(lengths[order])
    items = list(zip(order.tolist(), lengths[order].tolist(), costs[order].tolist(), strict=True))

    def attempt(count: int, share: float) -> list[list[int]] | None:
        split = int(np.searchsorted(placed, share * total, side="right"))
        packs = _place(items[:split], items[split:], count, capacity)
        return packs and [members for members in packs if members]

    gap = len(best_fit) - -(-total // capacity)
    gap = gap if gap >= FEWER_IS_WORTH * len(best_fit) else 0
    for count in sorted({len(best_fit) - gap * quarter // 4 for quarter in (1, 2, 3, 4)} - {len(best_fit)}):
        for share in SHARES_FOR_FEWER:
            if packs := attempt(count, share):
                return packs
    packs, good, bad, step = best_fit, 0, SHARE_STEPS + 1, SHARE_STEPS
    while bad - good > 1:
        if found := attempt(len(best_fit), step / SHARE_STEPS):
            packs, good = found, step
        else:
            bad = step
        step = (good + bad) // 2
    return packs


Items = list[tuple[int, int, float]]
"""(item, length, cost)"""


def _place(by_cost: Items, by_room: Items, count: int, capacity: int) -> list[list[int]] | None:
    """`by_cost` in the order given, each on the cheapest pack with room; then `by_room` by best fit. None: no room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    rooms = [capacity] * count
    cheapest = [(0.0, number) for number in range(count)]  # heap of packs that may have room for the next item
    parked: list[tuple[int, float, int]] = []  # heap of (-room, cost, pack) of those that had too little
    for item, length, cost in by_cost:
        while parked and -parked[0][0] >= length:
            _, spent, number = heapq.heappop(parked)
            heapq.heappush(cheapest, (spent, number))
        while cheapest and rooms[cheapest[0][1]] < length:
            spent, number = heapq.heappop(cheapest)
            heapq.heappush(parked, (-rooms[number], spent, number))
        if not cheapest:
            return None
        spent, number = cheapest[0]
        heapq.heapreplace(cheapest, (spent + cost, number))
        packs[number].append(item)
        rooms[number] -= length
    open_packs = _Rooms(enumerate(rooms))
    for item, length, _ in sorted(by_room, key=lambda entry: -entry[1]):
        found = open_packs.take(length)
        if found is None:
            return None
        number, room = found
        packs[number].append(item)
        open_packs.put(number, room - length)
    return packs


class _Rooms:
    """Packs by the room left in them."""

    def __init__(self, packs: Iterable[tuple[int, int]]):
        self._packs: dict[int, list[int]] = {}
        for number, room in packs:
            self._packs.setdefault(room, []).append(number)
        self._rooms = sorted(self._packs)

    def take(self, length: int) -> tuple[int, int] | None:
        """Take out the pack with the least room that is enough: (pack, room); of several the last put in."""
        place = bisect.bisect_left(self._rooms, length)
        if place == len(self._rooms):
            return None
        room = self._rooms[place]
        number = self._packs[room].pop()
        if not self._packs[room]:
            del self._packs[room]
            self._rooms.pop(place)
        return number, room

    def put(self, number: int, room: int) -> None:
        """Put a pack (back) in."""
        if room not in self._packs:
            self._packs[room] = []
            bisect.insort(self._rooms, room)
        self._packs[room].append(number)
