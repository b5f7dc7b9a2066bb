"""Pipeline stages: a thread produces the next items while the caller uses the current one."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Generator[Item, None, None], limit: int) -> Generator[Item, None, None]:
    """Yield ``items`` in order, with up to ``limit`` produced ahead of the caller in one thread.

    An error is raised in the place of its item. Closing this generator finishes the current item and closes ``items``.
    """
    pool, end = ThreadPoolExecutor(1), object()
    try:
        pending = deque(pool.submit(next, items, end) for _ in range(limit))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # not the sentinel
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()
