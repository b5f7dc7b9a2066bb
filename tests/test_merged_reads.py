"""Small reads that lie side by side in a file and wait in one queue are done in one go: same bytes, fewer reads, and
the same errors."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from made_files import PROFILE, SIDE_BY_SIDE, content, edges_of

from tierlm.checkpoints.checkpoint import ALIGNMENT, Record, TensorInfo, build_record
from tierlm.checkpoints.mirrors import Copy, MirrorReader, Volume
from tierlm.checkpoints.reader import DirectReader, MmapReader, Reader, Request
from tierlm.errors import StorageError
from tierlm.memory.disk import Disk
from tierlm.memory.slots import Slot, allocate
from tierlm.memory.ticket import Job, Priority, Ticket
from tierlm.memory.transfer import Transfer
from tierlm.spec import ExpertKey, Key

WAIT = 20.0
REQUEST = 2**20


pytestmark = pytest.mark.usefixtures("direct")


class Counting(DirectReader):
    """Notes the sizes of what it reads alone, and together."""

    def __init__(self) -> None:
        super().__init__()
        self.alone: list[int] = []
        self.together: list[list[int]] = []

    def descriptor(self, file: Path) -> int | None:
        return None  # all reads come by here

    def read(self, request: Request, buffer: memoryview) -> None:
        self.alone.append(len(buffer))
        super().read(request, buffer)

    def read_together(self, requests: Sequence[Request], buffers: Sequence[memoryview]) -> None:
        self.together.append([len(buffer) for buffer in buffers])
        super().read_together(requests, buffers)


def tensor(file: Path, name: str, start: int, stop: int) -> TensorInfo:
    return TensorInfo(name, file, start, stop - start, "U8", (stop - start,))


def records_of(file: Path, edges: Sequence[int]) -> list[Record]:
    """A record for each stretch of a file between two edges."""
    places = enumerate(itertools.pairwise(edges))
    return [build_record({"w": tensor(file, f"w{i}", start, stop)}) for i, (start, stop) in places]


@dataclass
class Shelf:
    """Records, and the slots into which a disk reads them."""

    records: list[Record]
    reader: Reader
    transfer: Transfer
    request_bytes: int = REQUEST
    slots: list[Slot] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [Slot(allocate(record.nbytes, torch.device("cpu"))) for record in self.records]
        self.disk = Disk(self.reader, self.record, self.transfer, self.request_bytes)

    def record(self, key: Key) -> Record:
        assert isinstance(key, ExpertKey)
        return self.records[key.expert]

    def fetch(self, i: int) -> Ticket:
        return self.disk.fetch(ExpertKey(0, i), self.slots[i], Priority.DEMAND, False)[0]

    def bytes_of(self, i: int) -> bytes:
        place = self.records[i].places["w"]
        return self.slots[i].buffer[place.offset : place.offset + place.nbytes].numpy().tobytes()


@contextmanager
def held(transfer: Transfer, threads: int = 1) -> Iterator[None]:
    """All threads wait until the end of the block, so that what is submitted in it queues up."""
    gate, inside = threading.Event(), threading.Semaphore(0)

    def run() -> None:
        inside.release()
        assert gate.wait(WAIT)

    for _ in range(threads):
        transfer.submit([Job("gate", 0, run, RuntimeError)])
        assert inside.acquire(timeout=WAIT)
    try:
        yield
    finally:
        gate.set()


@pytest.fixture
def one() -> Iterator[Transfer]:
    transfer = Transfer(1)
    yield transfer
    assert transfer.close(WAIT)


def finish(transfer: Transfer, tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        transfer.wait_any([ticket], WAIT)


# --- bytes


@PROFILE
@given(**SIDE_BY_SIDE)
def test_merged_reads_give_the_bytes_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    aligned: bool,
    start: int,
    order: random.Random,
    request_pages: int,
) -> None:
    edges, keys = edges_of(sizes, aligned, start), list(range(len(sizes)))
    if order.random() < 0.5:  # which may end this example: before there are threads
        order.shuffle(keys)
    file = tmp_path_factory.mktemp("merged") / "f"
    file.write_bytes(content(edges[-1]))
    transfer, reader = Transfer(1), Counting()
    shelf = Shelf(records_of(file, edges), reader, transfer, request_pages * ALIGNMENT)
    with held(transfer):
        tickets = [shelf.fetch(i) for i in keys]
    finish(transfer, tickets)
    assert [ticket.error for ticket in tickets] == [None] * len(tickets)
    for i in keys:
        assert shelf.bytes_of(i) == content(edges[-1])[edges[i] : edges[i + 1]]
    assert transfer.busy()["disk->ram"].bytes == sum(record.nbytes for record in shelf.records)
    # each job once, together no more than a request, but for the pages that two of them share
    assert sum(reader.alone) + sum(map(sum, reader.together)) == sum(record.nbytes for record in shelf.records)
    for lengths in reader.together:
        assert len(lengths) > 1 and sum(lengths) - (len(lengths) - 1) * ALIGNMENT <= request_pages * ALIGNMENT
    assert transfer.close(WAIT)
    reader.close()


def test_small_records_side_by_side_take_fewer_reads(tmp_path: Path, one: Transfer) -> None:
    """The shape of the demo model: records of 66 KB."""
    edges = list(range(1000, 1000 + 33 * 66_000, 66_000))
    file = tmp_path / "f"
    file.write_bytes(content(edges[-1]))
    reader = Counting()
    shelf = Shelf(records_of(file, edges), reader, one)
    with held(one):
        tickets = [shelf.fetch(i) for i in range(32)]
    finish(one, tickets)
    assert [len(lengths) for lengths in reader.together] == [15, 15, 2] and reader.alone == []
    assert all(shelf.bytes_of(i) == content(edges[-1])[edges[i] : edges[i + 1]] for i in range(32))
    reader.close()


def test_aligned_neighbours_share_no_page(tmp_path: Path, one: Transfer) -> None:
    edges = [8192, 16_384, 20_480, 40_960]
    file = tmp_path / "f"
    file.write_bytes(content(edges[-1]))
    reader = Counting()
    shelf = Shelf(records_of(file, edges), reader, one)
    with held(one):
        tickets = [shelf.fetch(i) for i in range(3)]
    finish(one, tickets)
    assert reader.together == [[8192, 4096, 20_480]]
    assert all(shelf.bytes_of(i) == content(edges[-1])[edges[i] : edges[i + 1]] for i in range(3))
    reader.close()


def test_every_slot_is_waited_for(tmp_path: Path, one: Transfer) -> None:
    """FAKE: the events of an accelerator. Each is waited for once, before anything is read."""
    file = tmp_path / "f"
    file.write_bytes(content(15_000))
    waited: list[int] = []

    @dataclass
    class Event:
        i: int

        def synchronize(self) -> None:
            assert not reader.together
            waited.append(self.i)

    reader = Counting()
    shelf = Shelf(records_of(file, [0, 5000, 10_000, 15_000]), reader, one)
    for i, slot in enumerate(shelf.slots):
        slot.guard = Event(i)  # type: ignore[assignment]
    with held(one):
        tickets = [shelf.fetch(i) for i in range(3)]
    finish(one, tickets)
    assert [ticket.error for ticket in tickets] == [None] * 3 and reader.together
    assert waited == [0, 1, 2]
    reader.close()


def test_neighbours_are_found_behind_other_jobs(tmp_path: Path, one: Transfer) -> None:
    """Weights and scales of several experts: each with those of its kind."""
    file = tmp_path / "f"
    file.write_bytes(content(2_000_000))
    records = [
        build_record({"w": tensor(file, f"w{i}", 500_000 * i, 500_000 * i + 480_000)}
                     | {"s": tensor(file, f"s{i}", 1_900_000 + 5000 * i, 1_905_000 + 5000 * i)})
        for i in range(3)
    ]  # fmt: skip
    reader = Counting()
    shelf = Shelf(records, reader, one, 2**19)
    with held(one):
        tickets = [shelf.fetch(i) for i in range(3)]
    finish(one, tickets)
    assert len(reader.alone) == 3 and [len(lengths) for lengths in reader.together] == [3]
    assert all(shelf.bytes_of(i) == content(2_000_000)[500_000 * i :][:480_000] for i in range(3))
    reader.close()


@pytest.mark.parametrize("kind", ["large", "apart", "backwards", "another file", "memory-mapped"])
def test_what_is_not_merged(tmp_path: Path, one: Transfer, kind: str) -> None:
    files = [tmp_path / "f", tmp_path / "g"]
    for file in files:
        file.write_bytes(content(3 * REQUEST))
    size = REQUEST if kind == "large" else 8192
    gap = ALIGNMENT if kind == "apart" else 0
    tensors = [tensor(files[i * (kind == "another file")], f"w{i}", i * (size + gap), i * (size + gap) + size)
               for i in range(2)]  # fmt: skip
    records = [build_record({"w": each}) for each in (tensors[::-1] if kind == "backwards" else tensors)]

    class Mapped(MmapReader):
        def read_together(self, requests: Sequence[Request], buffers: Sequence[memoryview]) -> None:
            raise AssertionError("a memory-mapped file has nothing to gain")

    reader = Mapped() if kind == "memory-mapped" else Counting()
    shelf = Shelf(records, reader, one)
    with held(one):
        tickets = [shelf.fetch(i) for i in range(2)]
    finish(one, tickets)
    assert [ticket.error for ticket in tickets] == [None, None]
    assert isinstance(reader, Mapped) or (reader.together == [] and len(reader.alone) == 2)
    reader.close()


def test_any_reader_can_read_together(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(content(3 * ALIGNMENT))
    requests = [Request(record.extents[0], record.extents[0].lo, record.extents[0].hi)
                for record in records_of(file, [0, 5000, 9000])]  # fmt: skip
    reader = MmapReader()
    buffers = [bytearray(request.hi - request.lo) for request in requests]
    reader.read_together(requests, [memoryview(buffer) for buffer in buffers])
    assert buffers[0][:5000] == content(5000) and buffers[1][904:4904] == content(9000)[5000:]
    reader.close()


# --- the queue


@dataclass(slots=True, eq=False, kw_only=True)
class Joiner(Job):
    """A job that goes together with any other of its kind."""

    ran: list[list[str]]
    name: str
    fails: bool = False

    def follows(self, jobs: Sequence[Job]) -> bool:
        return isinstance(jobs[0], Joiner)

    def run_with(self, others: Sequence[Job]) -> None:
        joined = [self, *(job for job in others if isinstance(job, Joiner))]
        if any(job.fails for job in joined):
            raise RuntimeError("together")
        self.ran.append([job.name for job in joined])


def joiner(ran: list[list[str]], name: str, fails: bool = False) -> Joiner:
    def run() -> None:
        if fails:
            raise ValueError(name)
        ran.append([name])

    return Joiner("link", 1, run, RuntimeError, ran=ran, name=name, fails=fails)


def test_no_thread_takes_more_than_its_share() -> None:
    """Others may be about to be free, and then do their part side by side."""
    transfer = Transfer(3)
    ran: list[list[str]] = []
    with held(transfer, 3):
        tickets = [transfer.submit([joiner(ran, f"{i}")]) for i in range(7)]
    finish(transfer, tickets)
    assert sorted(name for names in ran for name in names) == [f"{i}" for i in range(7)]
    assert max(map(len, ran)) == 3  # 1 + 6 // 3
    assert transfer.close(WAIT)


def test_demand_and_speculation_do_not_mix(one: Transfer) -> None:
    ran: list[list[str]] = []
    with held(one):
        guesses = [one.submit([joiner(ran, f"guess {i}")], priority=Priority.PREFETCH) for i in range(2)]
        demands = [one.submit([joiner(ran, f"demand {i}")]) for i in range(2)]
        late = one.submit([joiner(ran, "promoted")], priority=Priority.PREFETCH)
        one.promote(late)
    finish(one, [*guesses, *demands, late])
    assert ran == [["demand 0", "demand 1", "promoted"], ["guess 0", "guess 1"]]


def test_what_was_cancelled_is_not_taken_along(one: Transfer) -> None:
    ran: list[list[str]] = []
    with held(one):
        tickets = [one.submit([joiner(ran, f"{i}")]) for i in range(3)]
        assert one.cancel(tickets[1])
    finish(one, tickets)
    assert ran == [["0", "2"]]
    assert not one.cancel(tickets[0]) and not one.cancel(tickets[2])


def test_what_is_done_together_can_no_longer_be_cancelled(one: Transfer) -> None:
    inside, gate = threading.Event(), threading.Event()
    ran: list[list[str]] = []

    @dataclass(slots=True, eq=False)
    class Slow(Joiner):
        def run_with(self, others: Sequence[Job]) -> None:
            inside.set()
            assert gate.wait(WAIT)

    with held(one):
        tickets = [one.submit([Slow("link", 1, lambda: None, RuntimeError, ran=ran, name=f"{i}")]) for i in range(3)]
    assert inside.wait(WAIT)
    assert not any(one.cancel(ticket) for ticket in tickets)
    gate.set()
    finish(one, tickets)
    assert one.busy()["link"].bytes == 3 and one.busy()["link"].active == 0


def test_each_job_has_its_own_error(one: Transfer) -> None:
    ran: list[list[str]] = []
    with held(one):
        tickets = [one.submit([joiner(ran, f"{i}", fails=i == 1)]) for i in range(3)]
    finish(one, tickets)
    assert [type(ticket.error) for ticket in tickets] == [type(None), ValueError, type(None)]
    assert ran == [["0"], ["2"]] and one.busy()["link"].bytes == 2


def test_a_failed_tickets_other_jobs_are_left_alone(one: Transfer) -> None:
    ran: list[list[str]] = []
    with held(one):
        bad = one.submit([Job("link", 1, lambda: 1 / 0, RuntimeError), joiner(ran, "its other")])  # type: ignore[arg-type, return-value]
        good = one.submit([joiner(ran, "good")])
        last = one.submit([joiner(ran, "last")])
    finish(one, [bad, good, last])
    assert isinstance(bad.error, ZeroDivisionError) and ran == [["good", "last"]]


def test_a_job_whose_ticket_has_failed_is_not_taken_along(one: Transfer) -> None:
    ran: list[list[str]] = []
    done = one.submit([])
    done.done = True  # what comes after it goes to the front
    good: list[Ticket] = []

    def fail() -> None:
        good.append(one.submit([joiner(ran, "good")], after=done))
        raise ValueError

    with held(one):
        bad = one.submit([Job("link", 1, fail, RuntimeError), joiner(ran, "its other")])
        last = one.submit([joiner(ran, "last")])
    finish(one, [bad, last])
    finish(one, good)
    assert isinstance(bad.error, ValueError) and ran == [["good", "last"]]


# --- errors


@pytest.mark.parametrize("cut", [1000, 2500, 9000, 17_000, 24_999, 25_000])
def test_a_short_read_fails_those_that_it_is_short_of(tmp_path: Path, one: Transfer, cut: int) -> None:
    """Exactly as each alone: file, tensor, and offset."""
    edges = list(range(0, 30_000, 5000))
    file = tmp_path / "f"
    file.write_bytes(content(25_000))
    reader = Counting()
    shelf = Shelf(records_of(file, edges), reader, one)
    os.truncate(file, cut)
    with held(one):
        tickets = [shelf.fetch(i) for i in range(5)]
    finish(one, tickets)
    assert len(reader.together) == 1
    for i, ticket in enumerate(tickets):
        if edges[i + 1] <= cut:
            assert ticket.error is None and shelf.bytes_of(i) == content(25_000)[edges[i] : edges[i + 1]]
        else:
            assert isinstance(ticket.error, StorageError)
            assert (ticket.error.file, ticket.error.tensor) == (str(file), f"w{i}")
            assert edges[i] // ALIGNMENT * ALIGNMENT <= ticket.error.offset <= max(cut, edges[i])
    reader.close()


@pytest.mark.parametrize("how", ["refused", "short"])
def test_when_only_the_read_in_one_go_fails_nothing_does(
    tmp_path: Path, one: Transfer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """FAKE: os.preadv."""
    edges = list(range(0, 30_000, 5000))
    file = tmp_path / "f"
    file.write_bytes(content(25_000))
    real = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if len(buffers) == 1:
            return real(fd, buffers, offset)
        if how == "refused":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, buffers[:2], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reader = Counting()
    shelf = Shelf(records_of(file, edges), reader, one)
    with held(one):
        tickets = [shelf.fetch(i) for i in range(5)]
    finish(one, tickets)
    assert len(reader.together) == 1 and len(reader.alone) == 5
    assert all(ticket.error is None for ticket in tickets)
    assert all(shelf.bytes_of(i) == content(25_000)[edges[i] : edges[i + 1]] for i in range(5))
    reader.close()


@pytest.mark.parametrize("cut", [0, 4096, 7000, 12_000])
def test_the_error_of_a_read_in_one_go_says_where(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "f"
    file.write_bytes(content(15_000))
    extents = [record.extents[0] for record in records_of(file, [0, 5000, 10_000, 15_000])]
    requests = [Request(extent, extent.lo, extent.hi) for extent in extents]
    views = [allocate(request.hi - request.lo, torch.device("cpu")).numpy().data for request in requests]
    reader = DirectReader()
    reader.read_together(requests, views)
    os.truncate(file, cut)
    with pytest.raises(StorageError, match="expected 15000 bytes from 0") as caught:
        reader.read_together(requests, views)
    assert (caught.value.offset, caught.value.tensor) == (cut, f"w{cut // 5000}")
    reader.close()
    file.unlink()
    with pytest.raises(StorageError, match="No such file") as caught:
        DirectReader().read_together(requests, views)
    assert (caught.value.file, caught.value.tensor) == (str(file), "w0")


# --- mirrors


def mirrored(files: Sequence[Path], second: type[Reader] = Counting) -> tuple[MirrorReader, list[Copy]]:
    volumes = [Volume(Counting()), Volume(second())]
    copies = [Copy(file, volume) for file, volume in zip(files, volumes, strict=True)]
    return MirrorReader({files[0]: copies}), copies


@pytest.mark.parametrize("cut", [None, 5000])
def test_merged_reads_from_mirrors(tmp_path: Path, one: Transfer, cut: int | None) -> None:
    edges = list(range(0, 30_000, 5000))
    files = [tmp_path / "f", tmp_path / "copy"]
    for file in files:
        file.write_bytes(content(25_000))
    if cut is not None:
        os.truncate(files[0], cut)
    reader, copies = mirrored(files)
    shelf = Shelf(records_of(files[0], edges), reader, one)
    for _ in range(2):
        with held(one):
            tickets = [shelf.fetch(i) for i in range(5)]
        finish(one, tickets)
        assert all(ticket.error is None for ticket in tickets)
        assert all(shelf.bytes_of(i) == content(25_000)[edges[i] : edges[i + 1]] for i in range(5))
    together = [len(copy.volume.reader.together) for copy in copies if isinstance(copy.volume.reader, Counting)]
    assert together == ([1, 1] if cut is None else [1, 2])  # each has its turn; what failed is not asked again
    assert all(copy.volume.under_way == 0 for copy in copies)
    assert len(reader.troubles()) == (cut is not None)
    reader.close()


def test_mirrors_merge_where_all_disks_can(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(content(15_000))
    extents = [record.extents[0] for record in records_of(file, [0, 5000, 10_000])]
    one, two = (Request(extent, extent.lo, extent.hi) for extent in extents)
    assert mirrored([file, file])[0].adjoin(one, two)
    assert not mirrored([file, file], MmapReader)[0].adjoin(one, two)
