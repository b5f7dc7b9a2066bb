"""Stages that work side by side: while one item is in use, the next ones are being made in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Generator[Item, None, None], limit: int) -> Generator[Item, None, None]:
    """``items`` in their order, of which up to ``limit`` that nobody has asked for yet exist at a time.

    All of them are made in one thread. An error comes where its item would have come. When this generator is closed,
    ``items`` is closed too, after the item that is being made.
    """
    pool, end = ThreadPoolExecutor(1), object()
    try:
        waiting = deque(pool.submit(next, items, end) for _ in range(limit))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # it is not the end
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()
