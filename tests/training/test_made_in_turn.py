"""Micro-batches made ahead are the same ones, in the same order, and fail where they are wanted."""

from __future__ import annotations

import threading

import pytest

from megatron_npd.training.made_in_turn import made_in_turn


@pytest.mark.parametrize("ahead", [False, True])
def test_all_in_their_order(ahead: bool) -> None:
    assert list(made_in_turn(lambda n: n * n, [3, 1, 2], ahead)) == [9, 1, 4]
    assert list(made_in_turn(lambda n: n, [], ahead)) == []


def test_the_next_is_made_while_one_is_used_and_no_other() -> None:
    begun: list[int] = []
    second = threading.Event()

    def make(number: int) -> int:
        begun.append(number)
        if number == 1:
            second.set()
        return number

    made = made_in_turn(make, range(5), ahead=True)
    assert next(made) == 0
    assert second.wait(10), "begun though nobody asked for it"
    assert next(made) == 1
    made.close()
    assert set(begun) <= {0, 1, 2}


def test_without_it_nothing_is_made_before_it_is_asked_for() -> None:
    begun: list[int] = []
    made = made_in_turn(begun.append, range(3), ahead=False)
    assert begun == []
    next(made)
    assert begun == [0]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failure_comes_where_its_result_would_have_come(ahead: bool) -> None:
    def make(number: int) -> int:
        if number == 2:
            raise ValueError("shard 2: changed since the stage was opened")
        return number

    made = made_in_turn(make, range(4), ahead)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="shard 2: changed"):
        next(made)


def test_no_thread_is_left_behind() -> None:
    def batches() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]

    made = made_in_turn(lambda n: n, range(5), ahead=True)
    next(made)
    assert len(batches()) == 1
    made.close()
    assert batches() == []
