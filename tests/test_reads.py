"""Reads outside Python: the same bytes, order and errors as with Python's threads.

A thread is held in the announcement of a small read, which calls Python, while the queue is filled.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_files import PROFILE, SIDE_BY_SIDE, content, edges_of
from made_jobs import DEMAND, PREFETCH, WAIT, WARM_UP, Held, Shelf, call, reads_of

from tierlm.checkpoints.reader import Request, split
from tierlm.checkpoints.record import ALIGNMENT
from tierlm.errors import StorageError
from tierlm.memory import compiled
from tierlm.memory.compiled import Reads
from tierlm.memory.jobs import Read
from tierlm.memory.slots import Slot, allocate
from tierlm.memory.ticket import Ticket
from tierlm.memory.transfer import Transfer
from tierlm.policies.limits import touch_lanes
from tierlm.policies.residency import Purpose
from tierlm.spec import ExpertKey
from tierlm.timeline import Timeline

pytestmark = [
    pytest.mark.skipif(compiled.load() is None, reason="not built: there was no C++ compiler"),
    pytest.mark.usefixtures("direct"),
]


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """One thread, eight records of 10,000 bytes; nothing is merged."""
    file = tmp_path / "f"
    file.write_bytes(content(80_000))
    made = Shelf(file, range(0, 80_001, 10_000), Held())
    yield made
    made.close()


# --- bytes


@PROFILE
@given(threads=st.integers(1, 3), **SIDE_BY_SIDE)
def test_bytes_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    aligned: bool,
    start: int,
    order: random.Random,
    request_pages: int,
    threads: int,
) -> None:
    edges, keys = edges_of(sizes, aligned, start), list(range(len(sizes)))
    if order.random() < 0.5:  # may end this example, before threads start
        order.shuffle(keys)
    file = tmp_path_factory.mktemp("reads") / "f"
    file.write_bytes(content(edges[-1]))
    timeline, merged = Timeline(), request_pages * ALIGNMENT
    shelf = Shelf(file, edges, Held(threads, timeline, merged), merged)
    shelf.hold(threads)
    tickets = [shelf.fetch(i, Purpose(i % 3)) for i in keys]
    assert shelf.transfer.backlog() == sum(shelf.records[i].nbytes for i in keys if i % 3 == 0)
    shelf.transfer.gate.set()
    shelf.finish(*tickets)
    assert [ticket.error for ticket in tickets] == [None] * len(tickets)
    assert all(shelf.bytes_of(i) == shelf.expected(i) for i in keys)
    nbytes = threads * ALIGNMENT + sum(record.nbytes for record in shelf.records)
    link = shelf.transfer.busy()["disk->ram"]
    assert link.bytes == nbytes and link.seconds > 0 and link.cpu > 0 and shelf.transfer.backlog() == 0
    assert sum(map(sum, reads_of(timeline))) == sum(record.nbytes for record in shelf.records)
    shelf.close()


def test_small_records_side_by_side_take_fewer_reads(tmp_path: Path) -> None:
    """The demo model's layout: records of 66 KB, each sharing its first page with the record before."""
    edges = list(range(1000, 1000 + 33 * 66_000, 66_000))
    file, timeline = tmp_path / "f", Timeline()
    file.write_bytes(content(edges[-1]))
    shelf = Shelf(file, edges, Held(1, timeline, 2**20))
    shelf.hold()
    tickets = [shelf.fetch(i) for i in range(32)]
    shelf.transfer.gate.set()
    shelf.finish(*tickets)
    assert [len(nbytes) for nbytes in reads_of(timeline)] == [15, 15, 2]
    assert all(shelf.bytes_of(i) == shelf.expected(i) for i in range(32))
    shelf.close()


def test_no_thread_takes_more_than_its_share(tmp_path: Path) -> None:
    edges = list(range(0, 8 * 8192, 8192))
    file, timeline = tmp_path / "f", Timeline()
    file.write_bytes(content(edges[-1]))
    shelf = Shelf(file, edges, Held(3, timeline, 2**20))
    shelf.hold(3)
    tickets = [shelf.fetch(i) for i in range(7)]
    shelf.transfer.gate.set()
    shelf.finish(*tickets)
    assert max(map(len, reads_of(timeline))) == 3  # 1 + 6 // 3
    shelf.close()


def test_large_requests_are_apart(tmp_path: Path) -> None:
    file, timeline = tmp_path / "f", Timeline()
    file.write_bytes(content(4 * 2**20))
    shelf = Shelf(file, [0, 2**20, 4 * 2**20], Held(1, timeline, 2**20))
    shelf.hold()
    tickets = [shelf.fetch(0), shelf.fetch(1)]
    shelf.transfer.gate.set()
    shelf.finish(*tickets)
    assert reads_of(timeline) == [[2**20]] * 4
    assert all(shelf.bytes_of(i) == shelf.expected(i) for i in range(2))
    shelf.close()


# --- order


def order_of(named: dict[int, str], timeline: Timeline) -> list[str]:
    """The names of the reads, first to last."""
    spans = sorted((began, name) for track, _, name, began, _, _ in timeline._spans if track == "disk->ram")
    names = {str(ExpertKey(0, i)): name for i, name in named.items()}
    return [names[name] for _, name in spans if name in names]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Shelf, Timeline]]:
    """One thread, and its reads with their times."""
    file, timeline = tmp_path / "f", Timeline()
    file.write_bytes(content(80_000))
    made = Shelf(file, range(0, 80_001, 10_000), Held(1, timeline))
    yield made, timeline
    made.close()


def test_demands_go_first(watched: tuple[Shelf, Timeline]) -> None:
    shelf, timeline = watched
    shelf.hold()
    kinds = (WARM_UP, PREFETCH, DEMAND, WARM_UP, PREFETCH, DEMAND)
    tickets = [shelf.fetch(i, kind) for i, kind in enumerate(kinds)]
    shelf.transfer.gate.set()
    shelf.finish(*tickets)
    names = {i: f"{kind.name.lower()} {i}" for i, kind in enumerate(kinds)}
    expected = ["demand 2", "demand 5", "prefetch 1", "prefetch 4", "warm_up 0", "warm_up 3"]
    assert order_of(names, timeline) == expected


def test_a_promoted_prediction_is_a_demand(watched: tuple[Shelf, Timeline]) -> None:
    shelf, timeline = watched
    shelf.hold()
    tickets = [shelf.fetch(i, PREFETCH if i < 3 else DEMAND) for i in range(4)]
    shelf.transfer.promote(tickets[1])
    assert tickets[1].purpose is DEMAND
    shelf.transfer.promote(tickets[1])  # again
    shelf.transfer.gate.set()
    shelf.finish(*tickets)
    assert order_of(dict(enumerate("abcd")), timeline) == ["d", "b", "a", "c"]
    shelf.transfer.promote(tickets[0])  # too late, and harmless
    assert all(shelf.bytes_of(i) == shelf.expected(i) for i in range(4))


def test_predictions_leave_threads_to_demands(tmp_path: Path) -> None:
    """At most two of eight threads read predictions at any time."""
    file, timeline = tmp_path / "f", Timeline()
    file.write_bytes(content(32 * 2**20))
    shelf = Shelf(file, range(0, 32 * 2**20 + 1, 2**20), Held(8, timeline))
    shelf.finish(*[shelf.fetch(i, PREFETCH) for i in range(32)])
    spans = [(began, ended) for track, _, _, began, ended, _ in timeline._spans if track == "disk->ram"]
    assert len(spans) == 32
    assert max(sum(began <= at < ended for began, ended in spans) for at, _ in spans) <= 2
    shelf.close()


def test_warm_up_begins_between_demands(tmp_path: Path) -> None:
    file, timeline = tmp_path / "f", Timeline()
    file.write_bytes(content(32 * 2**20))
    shelf = Shelf(file, range(0, 32 * 2**20 + 1, 2**20), Held(8, timeline))
    shelf.finish(*[shelf.fetch(i, DEMAND if i % 2 else WARM_UP) for i in range(32)])
    spans = [(began, ended, details["priority"]) for _, _, _, began, ended, details in timeline._spans]
    demands = [(began, ended) for began, ended, priority in spans if priority == "demand"]
    warm_ups = [began for began, _, priority in spans if priority == "warm_up"]
    assert len(demands) == len(warm_ups) == 16
    assert not any(began <= at < ended for began, ended in demands for at in warm_ups)
    shelf.close()


# --- memory populated ahead of need


def resident(slot: Slot) -> int:
    """Bytes of ``slot`` that are in memory."""
    pages = -(-slot.size // ALIGNMENT)
    found = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(slot.buffer.data_ptr()), ctypes.c_size_t(slot.size), found) == 0
    return ALIGNMENT * sum(page & 1 for page in found)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def touchers() -> int:
    return sum(
        (task / "comm").read_text() == "tierlm-touch\n" for task in Path("/proc/self/task").iterdir() if task.exists()
    )


def test_memory_is_there_before_it_is_used_and_keeps_its_bytes() -> None:
    slots = [Slot(allocate(4 * 2**20, torch.device("cpu"))) for _ in range(5)]
    slots[3].buffer[-ALIGNMENT:] = 7  # the byte that is touched, too
    transfer = Transfer(1)
    transfer.populate(slots)
    until(lambda: all(resident(slot) == slot.size for slot in slots))
    assert [int(slot.buffer.sum()) for slot in slots] == [0, 0, 0, 7 * ALIGNMENT, 0]
    assert transfer.close(WAIT)


def test_memory_that_is_returned_is_not_populated_again() -> None:
    size, transfer = 64 * 2**20, Transfer(1)
    slots = [Slot(allocate(size, torch.device("cpu")), filled=True) for _ in range(4)]
    transfer.populate(slots)
    until(lambda: resident(slots[0]) > 0)
    for slot in slots:
        transfer.leave(slot)
        slot.decommit()
        transfer.leave(slot)  # again
    assert transfer.close(WAIT)  # no thread is left
    huge = 2 * 2**20
    assert all(resident(slot) <= huge for slot in slots), "at most the page that was being touched"


def test_close_leaves_no_thread_that_populates() -> None:
    gc.collect()  # transfers of other tests
    before, transfer = touchers(), Transfer(1)
    slots = [Slot(allocate(64 * 2**20, torch.device("cpu"))) for _ in range(4)]
    transfer.populate(slots)
    assert touchers() == before + touch_lanes()
    assert transfer.close(WAIT)
    until(lambda: touchers() == before)  # the system forgets a thread a little later


def test_warm_up_keeps_its_order_whatever_is_populated_first(watched: tuple[Shelf, Timeline]) -> None:
    shelf, timeline = watched
    tickets = [shelf.fetch(i, WARM_UP) for i in range(8)]
    shelf.finish(*tickets)
    assert order_of(dict(enumerate("abcdefgh")), timeline) == list("abcdefgh")
    assert all(shelf.bytes_of(i) == shelf.expected(i) for i in range(8))


def test_a_warm_up_populated_early_waits_for_those_before_it(tmp_path: Path) -> None:
    """While a demand waits, the last warm-up is populated first. It is read last all the same."""
    file, timeline, size = tmp_path / "f", Timeline(), 16 * 2**20
    large = touch_lanes() + 4
    edges = [0, *range(8192, 8192 + large * size + 1, size), 16384 + large * size]
    with file.open("wb") as made:
        made.truncate(edges[-1])
    shelf = Shelf(file, edges, Held(1, timeline))
    shelf.hold()
    tickets = [shelf.fetch(0)] + [shelf.fetch(i, WARM_UP) for i in range(1, large + 2)]
    until(lambda: resident(shelf.slots[-1]) == shelf.slots[-1].size)
    shelf.transfer.gate.set()
    shelf.finish(*tickets)
    names = [chr(ord("a") + i) for i in range(large + 2)]
    order = order_of(dict(enumerate(names)), timeline)
    assert [name for name, _ in itertools.groupby(order)] == names
    shelf.close()


@PROFILE
@given(fates=st.lists(st.sampled_from(["promote", "cancel", "keep"]), min_size=20, max_size=20))
def test_a_warm_up_ends_in_one_way(tmp_path_factory: pytest.TempPathFactory, fates: list[str]) -> None:
    """Whether its memory waits, is being populated or was populated, and whether its read has begun."""
    file = tmp_path_factory.mktemp("reads") / "f"
    file.write_bytes(content(20 * 10_000))
    shelf = Shelf(file, range(0, 20 * 10_000 + 1, 10_000), Held(2))
    tickets = [shelf.fetch(i, WARM_UP) for i in range(20)]
    gone = set()
    for i, (ticket, fate) in enumerate(zip(tickets, fates, strict=True)):
        if fate == "promote":
            shelf.transfer.promote(ticket)
        elif fate == "cancel" and shelf.transfer.cancel(ticket):
            gone.add(i)
    shelf.finish(*tickets)
    assert {i for i, ticket in enumerate(tickets) if ticket.cancelled} == gone
    assert all(shelf.bytes_of(i) == shelf.expected(i) for i in range(20) if i not in gone)
    shelf.close()


# --- cancellation


def test_cancelled_before_it_begins(watched: tuple[Shelf, Timeline]) -> None:
    shelf, timeline = watched
    shelf.hold()
    tickets = [shelf.fetch(i, PREFETCH) for i in range(3)]
    above = shelf.transfer.submit([call(lambda: None)], after=tickets[1])
    assert shelf.transfer.cancel(tickets[1]) and tickets[1].cancelled and tickets[1].done
    assert above.done and above.cancelled
    assert not shelf.transfer.cancel(tickets[1])
    shelf.transfer.gate.set()
    shelf.finish(tickets[0], tickets[2])
    assert order_of(dict(enumerate("abc")), timeline) == ["a", "c"]
    assert not shelf.slots[1].buffer.any()


def test_a_promoted_prediction_can_be_cancelled(watched: tuple[Shelf, Timeline]) -> None:
    shelf, timeline = watched
    shelf.hold()
    tickets = [shelf.fetch(i, PREFETCH) for i in range(2)]
    shelf.transfer.promote(tickets[0])
    assert shelf.transfer.cancel(tickets[0]) and shelf.transfer.backlog() == 0
    shelf.transfer.gate.set()
    shelf.finish(tickets[1])
    assert order_of(dict(enumerate("ab")), timeline) == ["b"]


def test_too_late_to_cancel(shelf: Shelf) -> None:
    ticket = shelf.fetch(0)
    shelf.finish(ticket)
    assert not shelf.transfer.cancel(ticket) and not ticket.cancelled


def test_a_ticket_that_has_begun_is_not_cancelled(tmp_path: Path) -> None:
    """Its first read has ended, its second is queued."""
    file = tmp_path / "f"
    file.write_bytes(content(3 * 8192))
    shelf = Shelf(file, [0, 3 * 8192], Held(1), 8192)
    ticket = shelf.fetch(0)
    reads = shelf.transfer.reads
    while (part := reads.unfinished(ticket)) is not None and not part.request.lo and not reads.count:
        pass
    assert not shelf.transfer.cancel(ticket)
    shelf.finish(ticket)
    assert shelf.bytes_of(0) == shelf.expected(0)
    shelf.close()


# --- what follows a read


def test_a_last_job_and_what_waits_for_the_ticket(shelf: Shelf) -> None:
    """Both begin without a caller that waits, once all bytes are there."""
    seen: list[bytes] = []
    over = threading.Event()
    last = call(lambda: seen.append(shelf.bytes_of(0)))
    shelf.hold()
    words = shelf.disk._split(ExpertKey(0, 0), shelf.records[0])[1]
    assert words is not None
    ticket = shelf.transfer.submit(shelf.read(words, shelf.slots[0]), last=last)
    above = shelf.transfer.submit([call(over.set)], after=ticket)
    assert seen == []
    shelf.transfer.gate.set()
    assert over.wait(WAIT)
    assert seen == [shelf.expected(0)] and ticket.done
    shelf.finish(above)


def test_after_a_ticket_that_ended_unnoticed(shelf: Shelf) -> None:
    ticket = shelf.fetch(0)
    while not shelf.transfer.reads.count:
        pass
    assert not ticket.done  # nobody has looked
    over = threading.Event()
    shelf.transfer.submit([call(over.set)], after=ticket)
    assert ticket.done and over.wait(WAIT)


def test_a_read_after_a_ticket_goes_before_the_queue(watched: tuple[Shelf, Timeline]) -> None:
    shelf, timeline = watched
    shelf.hold()
    first, behind = shelf.fetch(0), shelf.fetch(2)
    requests, words = shelf.disk._split(ExpertKey(0, 1), shelf.records[1])
    read = Read(shelf.reader, requests, words, shelf.slots[1], ExpertKey(0, 1))
    follows = shelf.transfer.submit(read, after=first)
    shelf.transfer.gate.set()
    shelf.finish(follows, behind)
    assert order_of(dict(enumerate("abc")), timeline) == ["a", "b", "c"]


# --- errors


def test_a_failed_read_is_told_as_python_tells_it(shelf: Shelf) -> None:
    shelf.finish(shelf.fetch(0))
    os.truncate(shelf.file, 35_000)
    tickets = [shelf.fetch(i) for i in (2, 3, 4)]
    shelf.finish(*tickets)
    assert tickets[0].error is None and shelf.bytes_of(2) == shelf.expected(2)
    error = tickets[1].error
    assert isinstance(error, StorageError)
    assert str(error) == f"{shelf.file}: reading w3 at offset 35000: expected 11328 bytes from 28672, found 6328"
    assert isinstance(tickets[2].error, StorageError) and "w4" in str(tickets[2].error)
    assert shelf.transfer.busy()["disk->ram"].bytes == shelf.records[0].nbytes + shelf.records[2].nbytes


def test_a_read_that_fails_once_is_none(shelf: Shelf) -> None:
    """Python's second attempt counts."""
    fd = os.open(shelf.file, os.O_WRONLY)  # cannot be read
    extent = shelf.records[0].extents[0]
    read = shelf.read([fd, 0, 1, ALIGNMENT, 0], shelf.slots[0], [Request(extent, extent.lo, extent.hi)])
    ticket = shelf.transfer.submit(read)
    seen: list[bytes] = []
    above = shelf.transfer.submit([call(lambda: seen.append(shelf.bytes_of(0)))], after=ticket)
    shelf.finish(above)
    assert seen == [shelf.expected(0)] and ticket.error is None
    os.close(fd)


def test_a_failure_skips_the_rest_of_the_ticket(shelf: Shelf) -> None:
    """Python reads it again; reads behind it are not affected."""
    bad, good = os.open(shelf.file, os.O_WRONLY), shelf.reader.descriptor(shelf.file)
    assert good is not None
    words = [bad, 0, 1, ALIGNMENT, 0, good, ALIGNMENT, 1, ALIGNMENT, ALIGNMENT]
    again = split(shelf.records[0].extents[0], 2 * ALIGNMENT)
    shelf.hold()
    ticket = shelf.transfer.submit(shelf.read(words, shelf.slots[0], again))
    behind = shelf.fetch(1)
    shelf.transfer.gate.set()
    shelf.finish(ticket, behind)
    assert ticket.error is None and shelf.bytes_of(1) == shelf.expected(1)
    assert len(again) == 2 and shelf.bytes_of(0) == shelf.expected(0)
    outside = shelf.transfer.reads.links()["disk->ram"].bytes
    assert outside == ALIGNMENT + shelf.records[1].nbytes  # including the one that held the thread
    os.close(bad)


def test_one_that_fails_does_not_fail_its_neighbours(tmp_path: Path) -> None:
    """They would have been merged, but the file ends."""
    edges = list(range(0, 6 * 8192, 8192))
    file = tmp_path / "f"
    file.write_bytes(content(edges[-1]))
    shelf = Shelf(file, edges, Held(1, None, 2**20))
    shelf.hold()
    tickets = [shelf.fetch(i) for i in range(5)]
    os.truncate(file, 4 * 8192 + 100)
    shelf.transfer.gate.set()
    shelf.finish(*tickets)
    assert [ticket.error is None for ticket in tickets] == [True] * 4 + [False]
    assert all(shelf.bytes_of(i) == shelf.expected(i) for i in range(4))
    shelf.close()


def test_a_stalled_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(content(3 * 8192))
    shelf = Shelf(file, [0, 3 * 8192], Held(1), 8192)
    shelf.hold()
    ticket = shelf.fetch(0)
    with pytest.raises(StorageError, match=r"reading w0 at offset 0: stalled: nothing came for 0\.01 s"):
        shelf.transfer.wait_any([ticket], 0.01)
    shelf.transfer.gate.set()
    shelf.finish(ticket)
    assert ticket.error is None
    shelf.close()


# --- the end


def test_threads_have_lanes_of_their_own(tmp_path: Path) -> None:
    """In a timeline, spans of a lane do not overlap."""
    file, timeline = tmp_path / "f", Timeline()
    file.write_bytes(content(64 * 2**20))
    shelf = Shelf(file, range(0, 64 * 2**20 + 1, 2**20), Held(4, timeline))
    shelf.hold(4)  # so that each has read something
    tickets = [shelf.fetch(i) for i in range(64)]
    shelf.transfer.gate.set()
    shelf.finish(*tickets)
    lanes: dict[int, list[tuple[float, float]]] = {}
    for track, lane, _, began, ended, _ in timeline._spans:
        if track == "disk->ram":
            lanes.setdefault(lane, []).append((began, ended))
    assert len(lanes) == 4
    for spans in lanes.values():
        spans.sort()
        assert all(one[1] <= following[0] for one, following in itertools.pairwise(spans))
    shelf.close()


def test_close_drops_what_is_queued_and_says_who_is_stuck(shelf: Shelf) -> None:
    transfer = shelf.transfer
    shelf.hold()
    queued = shelf.fetch(0)
    assert not transfer.close(0.01)
    transfer.gate.set()
    assert transfer.close(WAIT)
    assert transfer.close(WAIT)  # again
    assert not queued.done and not shelf.slots[0].buffer.any()
    assert transfer.busy()["disk->ram"].bytes == ALIGNMENT
    with pytest.raises(RuntimeError, match="closed"):
        shelf.fetch(1)


def test_threads_and_memory_are_gone_after_closing(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(content(80_000))

    def reading() -> list[str]:
        """The reading threads, as the system lists them; one may be listed for a moment after it was joined."""
        names = []
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it has ended
                names.append((task / "comm").read_text())
        return [name for name in names if name.startswith("tierlm-read")]

    made: list[weakref.ref[Reads]] = []
    for _ in range(20):
        shelf = Shelf(file, range(0, 80_001, 10_000), Held(4))
        assert len(reading()) >= 4
        shelf.finish(*(shelf.fetch(i) for i in range(8)))
        shelf.close()
        assert isinstance(shelf.transfer.reads, Reads)
        made.append(weakref.ref(shelf.transfer.reads))
    until = time.monotonic() + WAIT
    while reading() and time.monotonic() < until:
        time.sleep(0.001)
    assert reading() == []
    assert not [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("tierlm-read", "tierlm-transfer"))
    ]
    del shelf
    gc.collect()
    assert all(reads() is None for reads in made)


def test_python_may_end_without_closing(tmp_path: Path) -> None:
    """With reads in flight and announcements pending."""
    file = tmp_path / "f"
    file.write_bytes(content(64 * 2**20))
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from made_jobs import Shelf, call
from pathlib import Path
from tierlm.memory.transfer import Transfer
shelf = Shelf(Path({str(file)!r}), range(0, 64 * 2**20 + 1, 2**20), Transfer(8))
for i in range(64):
    ticket = shelf.fetch(i)
    shelf.transfer.submit([call(lambda: None)], after=ticket)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_nothing_is_lost_under_load(tmp_path: Path) -> None:
    """Reads, Python jobs after them, promotions and cancellations over four threads each."""
    file = tmp_path / "f"
    file.write_bytes(content(400 * 5000))
    chance = random.Random(1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        shelf = Shelf(file, range(0, 400 * 5000 + 1, 5000), Held(4, None, 2**16))
        ran: list[int] = []
        tickets: list[Ticket] = []
        above: dict[int, Ticket] = {}
        shelf.hold(4)
        for i in range(400):
            if i == 100:
                shelf.transfer.gate.set()
            tickets.append(shelf.fetch(i, chance.choice(list(Purpose))))
            if chance.random() < 0.3:
                job = call(lambda i=i: ran.append(i))  # type: ignore[misc]
                above[i] = shelf.transfer.submit([job], after=tickets[i])
            if chance.random() < 0.3:
                shelf.transfer.promote(tickets[chance.randrange(i + 1)])
            if chance.random() < 0.2:
                shelf.transfer.cancel(tickets[chance.randrange(max(0, i - 5), i + 1)])
        shelf.finish(*tickets, *above.values())
    finally:
        sys.setswitchinterval(interval)
    for i, ticket in enumerate(tickets):
        assert ticket.error is None
        assert shelf.bytes_of(i) == (b"\0" * 5000 if ticket.cancelled else shelf.expected(i))
    assert sorted(ran) == [i for i in above if not tickets[i].cancelled]
    assert any(ticket.cancelled for ticket in tickets) and not shelf.transfer.reads._tickets
    shelf.close()
