"""What is made ahead is the same, in the same order, and fails where it is wanted."""

from __future__ import annotations

import gc
import threading

import pytest

from megatron_npd.data.ahead import Ahead


def test_all_in_their_order() -> None:
    squares = Ahead([3, 1, 2], lambda number: number * number)
    assert [squares(3), squares(1), squares(2)] == [9, 1, 4]


def test_the_next_is_made_while_one_is_used_and_no_other() -> None:
    begun: list[int] = []
    second = threading.Event()

    def make(number: int) -> int:
        begun.append(number)
        if number == 1:
            second.set()
        return number

    made = Ahead(range(5), make)
    assert begun == []
    assert made(0) == 0
    assert second.wait(10), "begun though nobody asked for it"
    assert made(1) == 1
    assert made(2) == 2
    assert set(begun) <= {0, 1, 2, 3}


def test_a_failure_comes_where_its_result_would_have_come() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("shard 2: changed since the stage was opened")
        return number

    made = Ahead(range(4), make)
    assert [made(0), made(1)] == [0, 1]
    with pytest.raises(ValueError, match="shard 2: changed"):
        made(2)


@pytest.mark.parametrize("asked", [1, 4])
def test_another_order_is_an_error(asked: int) -> None:
    with pytest.raises(AssertionError, match=f"{asked} is not the next"):
        Ahead(range(3), str)(asked)


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    made = Ahead(range(5), str)
    made(0)
    (mine,) = (each for each in threading.enumerate() if each not in before and each.name.startswith("ahead"))
    del made
    gc.collect()
    mine.join(10)
    assert not mine.is_alive()
