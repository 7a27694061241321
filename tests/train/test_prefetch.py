from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from collage.train.prefetch import Prefetched


def test_items_come_in_order_and_the_thread_ends() -> None:
    with Prefetched(range(100), 3) as items:
        assert list(items) == list(range(100))
    assert not _threads()


def test_an_error_is_raised_where_its_item_would_have_been() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = Prefetched(broken(), 3)
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert not _threads()


def test_no_more_is_made_than_was_asked_for_and_closing_stops_a_waiting_thread() -> None:
    made: list[int] = []
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                made.append(len(made))
                yield len(made)
        finally:
            closed.set()

    items = Prefetched(endless(), 2)
    assert [next(items), next(items)] == [1, 2]
    items.close()
    assert closed.is_set()
    assert len(made) <= 2 + 2 + 1
    assert not _threads()
    assert list(items) == []


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "collage-prefetch"]
