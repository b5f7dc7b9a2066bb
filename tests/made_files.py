"""Files of records for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from tierlm.checkpoints.record import ALIGNMENT

PROFILE = settings(deadline=None, derandomize=True, max_examples=40)
# Adjacent records, as small as a few bytes of one page, in and out of order, and requests that cut them.
SIDE_BY_SIDE: dict[str, st.SearchStrategy[Any]] = {
    "sizes": st.lists(st.integers(1, 3 * ALIGNMENT), min_size=1, max_size=24),
    "aligned": st.booleans(),
    "start": st.integers(0, 9000),
    "order": st.randoms(use_true_random=False),
    "request_pages": st.integers(1, 12),
}


def content(size: int) -> bytes:
    """Bytes without a period near a power of two."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def edges_of(sizes: Sequence[int], aligned: bool, start: int) -> list[int]:
    """Where records of ``sizes`` begin and end, from about ``start`` on; ``aligned``: on pages."""
    edges = [start // ALIGNMENT * ALIGNMENT if aligned else start]
    for size in sizes:
        edges.append(edges[-1] + (-(-size // ALIGNMENT) * ALIGNMENT if aligned else size))
    return edges
