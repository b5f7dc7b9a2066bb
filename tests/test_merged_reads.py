"""Small adjacent reads of a file that wait in one queue are merged: same bytes, fewer reads, and the same errors.
test_reads.py tests the bytes themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from made_files import content
from made_jobs import DEMAND, PREFETCH, Held, Shelf, reads_of

from tierlm.checkpoints.record import ALIGNMENT, Record, TensorInfo, build_record
from tierlm.errors import StorageError
from tierlm.memory import compiled
from tierlm.memory.ticket import Ticket
from tierlm.timeline import Timeline

REQUEST = 2**20

pytestmark = [
    pytest.mark.skipif(compiled.load() is None, reason="not built: there was no C++ compiler"),
    pytest.mark.usefixtures("direct"),
]


class Bench:
    """A shelf with one thread, and the reads that it merged."""

    def __init__(self, file: Path, edges: Sequence[int], records: list[Record] | None = None, merged: int = REQUEST):
        self.timeline = Timeline()
        self.shelf = Shelf(file, edges, Held(1, self.timeline, merged), merged, records)

    def fetch(self, numbers: Sequence[int]) -> list[Ticket]:
        """Read records that all wait in the queue."""
        self.shelf.hold()
        tickets = [self.shelf.fetch(i) for i in numbers]
        self.go(tickets)
        return tickets

    def go(self, tickets: Sequence[Ticket]) -> None:
        self.shelf.transfer.gate.set()
        self.shelf.finish(*tickets)

    @property
    def together(self) -> list[list[int]]:
        return reads_of(self.timeline)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Five records of 5,000 bytes, which share pages."""
    file = tmp_path / "f"
    file.write_bytes(content(25_000))
    made = Bench(file, range(0, 25_001, 5000))
    yield made
    made.shelf.close()


def tensor(file: Path, name: str, start: int, stop: int) -> TensorInfo:
    return TensorInfo(name, file, start, stop - start, "U8", (stop - start,))


def test_aligned_neighbours_share_no_page(tmp_path: Path) -> None:
    edges = [8192, 16_384, 20_480, 40_960]
    file = tmp_path / "f"
    file.write_bytes(content(edges[-1]))
    bench = Bench(file, edges)
    bench.fetch(range(3))
    assert bench.together == [[8192, 4096, 20_480]]
    assert all(bench.shelf.bytes_of(i) == bench.shelf.expected(i) for i in range(3))
    bench.shelf.close()


def test_neighbours_are_found_behind_other_reads(tmp_path: Path) -> None:
    """Weights and scales of several experts: each merges with those of its kind."""
    file = tmp_path / "f"
    file.write_bytes(content(2_000_000))
    records = [
        build_record({"w": tensor(file, f"w{i}", 500_000 * i, 500_000 * i + 480_000)}
                     | {"s": tensor(file, f"s{i}", 1_900_000 + 5000 * i, 1_905_000 + 5000 * i)})
        for i in range(3)
    ]  # fmt: skip
    bench = Bench(file, [], records, 2**19)
    bench.fetch(range(3))
    assert sorted(map(len, bench.together)) == [1, 1, 1, 3]
    assert all(bench.shelf.bytes_of(i) == content(2_000_000)[500_000 * i :][:480_000] for i in range(3))
    bench.shelf.close()


@pytest.mark.parametrize("kind", ["large", "apart", "backwards", "another file"])
def test_what_is_not_merged(tmp_path: Path, kind: str) -> None:
    files = [tmp_path / "f", tmp_path / "g"]
    for file in files:
        file.write_bytes(content(3 * REQUEST))
    size = REQUEST if kind == "large" else 8192
    gap = ALIGNMENT if kind == "apart" else 0
    tensors = [tensor(files[i * (kind == "another file")], f"w{i}", i * (size + gap), i * (size + gap) + size)
               for i in range(2)]  # fmt: skip
    records = [build_record({"w": each}) for each in (tensors[::-1] if kind == "backwards" else tensors)]
    bench = Bench(files[0], [], records)
    assert [ticket.error for ticket in bench.fetch(range(2))] == [None, None]
    assert bench.together == [[size], [size]]
    bench.shelf.close()


def test_demand_and_prefetch_do_not_mix(bench: Bench) -> None:
    shelf = bench.shelf
    shelf.hold()
    tickets = [shelf.fetch(i, kind) for i, kind in enumerate((PREFETCH, PREFETCH, DEMAND, DEMAND, PREFETCH))]
    shelf.transfer.promote(tickets[4])
    bench.go(tickets)
    assert sorted(map(len, bench.together)) == [2, 3]
    order = sorted((began, name) for track, _, name, began, _, _ in bench.timeline._spans if track == "disk->ram")
    assert {name for _, name in order[-2:]} == {"expert 0 of layer 0", "expert 1 of layer 0"}


def test_what_was_cancelled_is_not_taken_along(bench: Bench) -> None:
    shelf = bench.shelf
    shelf.hold()
    tickets = [shelf.fetch(i) for i in range(3)]
    assert shelf.transfer.cancel(tickets[1])
    bench.go(tickets)
    assert bench.together == [[8192, 8192]] and not shelf.slots[1].buffer.any()
    assert not shelf.transfer.cancel(tickets[0]) and not shelf.transfer.cancel(tickets[2])


@pytest.mark.parametrize("cut", [1000, 2500, 9000, 17_000, 24_999, 25_000])
def test_a_short_read_fails_those_that_it_is_short_of(bench: Bench, cut: int) -> None:
    """With the same file, tensor and offset as alone."""
    shelf = bench.shelf
    os.truncate(shelf.file, cut)
    for i, ticket in enumerate(bench.fetch(range(5))):
        if shelf.edges[i + 1] <= cut:
            assert ticket.error is None and shelf.bytes_of(i) == shelf.expected(i)
        else:
            assert isinstance(ticket.error, StorageError)
            assert (ticket.error.file, ticket.error.tensor) == (str(shelf.file), f"w{i}")
            assert shelf.edges[i] // ALIGNMENT * ALIGNMENT <= ticket.error.offset <= max(cut, shelf.edges[i])
    assert len(bench.together[0]) == 5
