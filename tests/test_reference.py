"""The classic policies miss as often as libCacheSim's; bench/reference.py compares them live, request for request."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import reference

# Misses of libCacheSim 0.3.5, by sequence and slots: the last line of `python bench/reference.py`.
GOLDEN = {
    ("uniform", 20): {
        "fifo": 2497,
        "lru": 2500,
        "lfu": 2485,
        "clock": 2491,
        "sieve": 2467,
        "s3-fifo": 2503,
        "2q": 2500,
        "arc": 2519,
        "belady": 1578,
    },
    ("uniform", 60): {
        "fifo": 1528,
        "lru": 1523,
        "lfu": 1472,
        "clock": 1506,
        "sieve": 1499,
        "s3-fifo": 1499,
        "2q": 1508,
        "arc": 1528,
        "belady": 666,
    },
    ("skewed", 20): {
        "fifo": 1702,
        "lru": 1524,
        "lfu": 1287,
        "clock": 1479,
        "sieve": 1231,
        "s3-fifo": 1278,
        "2q": 1402,
        "arc": 1407,
        "belady": 878,
    },
    ("skewed", 60): {
        "fifo": 735,
        "lru": 589,
        "lfu": 544,
        "clock": 577,
        "sieve": 537,
        "s3-fifo": 527,
        "2q": 596,
        "arc": 573,
        "belady": 297,
    },
    ("loop", 20): {
        "fifo": 2431,
        "lru": 2391,
        "lfu": 1774,
        "clock": 2362,
        "sieve": 1863,
        "s3-fifo": 1892,
        "2q": 2051,
        "arc": 2160,
        "belady": 1295,
    },
    ("loop", 60): {
        "fifo": 668,
        "lru": 235,
        "lfu": 212,
        "clock": 225,
        "sieve": 212,
        "s3-fifo": 216,
        "2q": 395,
        "arc": 220,
        "belady": 162,
    },
    ("demo", 20): {
        "fifo": 5232,
        "lru": 5232,
        "lfu": 5232,
        "clock": 5232,
        "sieve": 5232,
        "s3-fifo": 4553,
        "2q": 4722,
        "arc": 5232,
        "belady": 3142,
    },
    ("demo", 60): {
        "fifo": 3218,
        "lru": 3135,
        "lfu": 3380,
        "clock": 3082,
        "sieve": 3380,
        "s3-fifo": 2975,
        "2q": 2955,
        "arc": 2942,
        "belady": 1519,
    },
}
CASES = [(*case, policy) for case, row in GOLDEN.items() for policy in row]


@pytest.fixture(scope="module")
def sequences() -> dict[str, list[int]]:
    found = {kind: reference.made(kind) for kind in ("uniform", "skewed", "loop")}
    return found | {"demo": reference.flat(reference.DEMO)}


@pytest.mark.parametrize(("sequence", "slots", "policy"), CASES)
def test_misses_equal_those_of_libcachesim(
    sequences: dict[str, list[int]], sequence: str, slots: int, policy: str
) -> None:
    assert reference.hits(policy, sequences[sequence], slots).count(False) == GOLDEN[sequence, slots][policy]


def test_all_that_are_compared_live_are_held_here() -> None:
    assert all(list(row) == list(reference.THEIRS) for row in GOLDEN.values())
