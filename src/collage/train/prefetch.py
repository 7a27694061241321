"""Items made ahead in a thread, so that reading and tokenizing don't hold up whoever takes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

_POLL_SECONDS = 0.1


class Prefetched(Generic[Item]):
    """An iterator over `items`, which a thread makes up to `ahead` items before they are taken.

    An error of the thread is raised where its item would have been. `close`, or the end of a `with`, stops the thread.
    """

    def __init__(self, items: Iterable[Item], ahead: int) -> None:
        self._queue: queue.Queue[tuple[str, object]] = queue.Queue(ahead)
        self._stopping = threading.Event()
        # A daemon, so that a program that ends without closing is not kept alive by a full queue.
        arguments = (iter(items), self._queue, self._stopping)
        self._thread = threading.Thread(target=_fill, args=arguments, daemon=True, name="collage-prefetch")
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._stopping.is_set():
            raise StopIteration
        kind, item = self._queue.get()
        if kind == "item":
            return item  # pyright: ignore[reportReturnType]
        self.close()
        if kind == "error":
            assert isinstance(item, BaseException)
            raise item
        raise StopIteration

    def __enter__(self) -> Prefetched[Item]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait until it has ended; items made ahead are dropped."""
        self._stopping.set()
        self._thread.join()


def _fill(items: Iterator[object], into: queue.Queue[tuple[str, object]], stopping: threading.Event) -> None:
    last: tuple[str, object] = ("end", None)
    try:
        for item in items:
            if not _put(into, ("item", item), stopping):
                return
    except BaseException as error:  # raised again in the thread that takes the items
        last = ("error", error)
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()  # files are closed in the thread that opened them
    _put(into, last, stopping)


def _put(into: queue.Queue[tuple[str, object]], entry: tuple[str, object], stopping: threading.Event) -> bool:
    """Whether the entry was put before the thread was told to stop."""
    while not stopping.is_set():
        try:
            into.put(entry, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False
