"""The expert store over one and two tiers, with real transfer threads and synthetic records.

Gates decide what is in flight: a paused shelf holds every read, a hung key its own. A read first fills its part of the
slot with NaN, so that a slot reused too early is noticed.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tierlm.checkpoints.reader import Reader, Request, failure
from tierlm.checkpoints.record import Record, TensorInfo, build_record
from tierlm.checkpoints.views import Weights
from tierlm.errors import StorageError
from tierlm.memory.disk import Disk
from tierlm.memory.slots import Entry, Slot
from tierlm.memory.store import Leases, Store
from tierlm.memory.ticket import Ticket
from tierlm.memory.tiers import Source, Tier
from tierlm.memory.transfer import Transfer
from tierlm.memory.trunks import Trunks
from tierlm.policies import POLICIES, make_policy
from tierlm.policies.eviction import TierInfo
from tierlm.policies.lookahead import Lookahead
from tierlm.policies.prediction import Predictor
from tierlm.policies.prefetch import Always
from tierlm.policies.residency import Purpose, Residency
from tierlm.spec import ExpertKey, Key, TrunkKey

LAYERS, EXPERTS = 3, 6
WAIT = 20.0  # seconds; reached only by a test that fails
SOON = 0.05  # seconds; after which a read that hangs counts as stalled


class Watched(Transfer):
    """A transfer that fails a test at once if the store waits for nothing."""

    def wait_any(self, tickets: Sequence[Ticket], timeout: float) -> None:
        assert tickets, "the store waits, and nothing is on its way"
        super().wait_any(tickets, timeout)


class Shelf(Reader):
    """Records whose bytes follow from their key, in two files each. ``reads`` counts reads begun, by key and file."""

    name = "shelf"

    def __init__(self) -> None:
        self.failing: set[Key] = set()
        self.reads: Counter[tuple[Key, int]] = Counter()
        self.violations: list[str] = []
        self._running = threading.Event()
        self._running.set()
        self._hung: dict[Key, threading.Event] = {}
        self._active: dict[tuple[Key, int], int] = {}
        self._lock = threading.Condition()

    def pause(self) -> None:
        """Hold every read from now on."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    @property
    def paused(self) -> bool:
        return not self._running.is_set()

    def hang(self, key: Key) -> None:
        """Hold the reads of the first file of ``key``."""
        self._hung[key] = threading.Event()

    def come_back(self, key: Key) -> None:
        self._hung.pop(key).set()

    def wait_for_reads(self, count: int) -> None:
        """Until ``count`` reads are in flight."""
        with self._lock:
            assert self._lock.wait_for(lambda: len(self._active) >= count, WAIT)

    def read(self, request: Request, buffer: memoryview) -> None:
        key, part = key_of(str(request.extent.file)), request.extent.file.name[-1]
        place = np.frombuffer(buffer, np.float32)
        address = place.ctypes.data
        with self._lock:
            if (key, int(part)) in self._active:
                self.violations.append(f"{key} is read twice at the same time")
            if address in self._active.values():
                self.violations.append(f"{key} is read into a slot that is being filled")
            self._active[key, int(part)] = address
            self.reads[key, int(part)] += 1
            self._lock.notify_all()
        try:
            place[:] = np.nan
            assert self._running.wait(WAIT)
            hung = self._hung.get(key) if part == "0" else None
            assert hung is None or hung.wait(WAIT)
            if key in self.failing:
                raise failure(request, request.start, "made to fail")
            place[:] = value_of(key, int(part))
        finally:
            with self._lock:
                del self._active[key, int(part)]

    def close(self) -> None:
        """Release everything that is held."""
        self.resume()
        for key in list(self._hung):
            self.come_back(key)


def numbers_of(key: Key) -> tuple[int, ...]:
    assert isinstance(key, ExpertKey | TrunkKey)
    return key if isinstance(key, ExpertKey) else (key.layer,)


def value_of(key: Key, part: int) -> float:
    """What the shelf's files hold."""
    layer, *expert = numbers_of(key)
    return float(layer * 1000 + (expert[0] * 10 if expert else 500) + part + 1)


def key_of(file: str) -> Key:
    """The key of one of the shelf's files."""
    numbers = [int(number) for number in Path(file).name.split("-")[:-1]]
    return ExpertKey(*numbers) if len(numbers) == 2 else TrunkKey(*numbers)


def record_of(key: Key) -> Record:
    """Three matrices; two are adjacent in one file; none is at its start."""
    name = "-".join(map(str, numbers_of(key)))

    def tensor(role: str, part: int, offset: int) -> TensorInfo:
        return TensorInfo(f"{name}.{role}", Path(f"/shelf/{name}-{part}"), offset, 64, "F32", (4, 4), "f32")

    return build_record(
        {"gate_proj": tensor("gate_proj", 0, 128), "up_proj": tensor("up_proj", 0, 200)}
        | {"down_proj": tensor("down_proj", 1, 5000)}
    )


SIZE = record_of(ExpertKey(0, 0)).nbytes


def is_whole(weights: Weights, key: Key) -> bool:
    """Whether these are the weights of ``key``."""
    assert set(weights) == {"gate_proj", "up_proj", "down_proj"}
    parts = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    return all(bool((weights[role].data == value_of(key, part)).all()) for role, part in parts.items())


class Told(Predictor):
    """Predicts what it is told."""

    def __init__(self) -> None:
        super().__init__(EXPERTS)
        self.told: list[ExpertKey] = []

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """Learns nothing."""

    def predict(self, layer: int) -> list[ExpertKey]:
        return [key for key in self.told if key.layer == layer]


class Bench:
    """A store over one tier ("ram") or two ("vram" over "ram", both in host memory)."""

    def __init__(self, slots: Sequence[int], policy: str = "cycle", layers: int = LAYERS, threads: int = 2):
        self.shelf, self.transfer = Shelf(), Watched(threads)
        self.tiers: list[Tier] = []  # from the bottom up
        source: Source = Disk(self.shelf, record_of, self.transfer, 2**20)
        for name, count in zip(("ram", "vram"), slots, strict=False):
            made = [Slot(torch.zeros(SIZE, dtype=torch.uint8)) for _ in range(count)]
            tier = Tier(
                name, made, source, self.transfer, make_policy(policy, TierInfo(layers, count)), lambda key: SIZE
            )
            self.tiers.append(tier)
            source = tier
        self.top = self.tiers[-1]
        self.predictor = Told()
        self.store = Store(self.top, record_of, Lookahead(self.predictor, range(layers), Always()), WAIT)

    def predict(self, keys: Sequence[ExpertKey], streaming: bool = False) -> None:
        """Predict keys of any layers."""
        self.predictor.told = list(keys)
        for layer in dict.fromkeys(key.layer for key in keys):
            self.store.look_ahead(layer, 1, streaming)

    def close(self) -> None:
        self.shelf.close()
        assert self.transfer.close(WAIT)

    def use(self, layer: int, experts: Sequence[int], *, streaming: bool = False) -> list[int]:
        """Acquire, check and release; returns the experts in order of arrival."""
        came = []
        with self.store.acquire(layer, experts, streaming=streaming) as leases:
            for expert, weights in all_of(leases):
                assert is_whole(weights, ExpertKey(layer, expert))
                came.append(expert)
        assert sorted(came) == sorted(experts)
        return came

    def resident(self, tier: Tier) -> set[Key]:
        """The records in ``tier``, including those that have just arrived."""
        return {key for key, entry in tier.entries.items() if has_arrived(entry)}

    def drain(self, hung: Key | None = None) -> None:
        """Wait until nothing is in flight except ``hung``."""
        self.shelf.resume()
        for tier in self.tiers:
            for entry in list(tier.entries.values()):
                if entry.ticket is not None and entry.key != hung:
                    self.transfer.wait_any([entry.ticket], WAIT)
        self.top.settle()

    def check(self) -> None:
        """What holds whenever nothing is leased, whatever is in flight."""
        assert self.shelf.violations == []
        above: Tier | None = None
        for tier in reversed(self.tiers):
            tier.check_integrity()
            sources = Counter(id(entry.source) for entry in above.entries.values()) if above else Counter[int]()
            for key, entry in tier.entries.items():
                assert entry.pins == sources[id(entry)], f"{key} in {tier.name}"
                if entry.ticket is None:
                    self._check_bytes(entry)
            stats, predictions = tier.stats, len(tier.residency.prefetched)
            if above is None:
                assert stats.useful + stats.wasted + stats.cancelled + predictions == stats.prefetched
            else:  # a prediction taken over by the tier above is counted there
                assert stats.useful + stats.wasted + stats.cancelled + predictions <= stats.prefetched
                assert stats.hits + stats.late_hits + stats.misses == above.stats.misses
            above = tier

    def _check_bytes(self, entry: Entry) -> None:
        data = entry.slot.buffer.numpy().view(np.float32)
        for extent, part in zip(record_of(entry.key).extents, (0, 1), strict=True):
            found = data[extent.at // 4 : (extent.at + extent.hi - extent.lo) // 4]
            assert (found == value_of(entry.key, part)).all(), f"{entry.key} is spoilt"


def is_warm(residency: Residency[Entry], key: Key) -> bool:
    return key not in residency.leaving and key not in residency.prefetched


def has_arrived(entry: Entry) -> bool:
    ticket = entry.ticket
    return ticket is None or (ticket.done and ticket.error is None and not ticket.cancelled)


@contextmanager
def bench_of(*slots: int, policy: str = "cycle", layers: int = LAYERS, threads: int = 2) -> Iterator[Bench]:
    bench = Bench(slots, policy, layers, threads)
    try:
        yield bench
        bench.drain()
        bench.check()
    finally:
        bench.close()


def all_of(leases: Leases) -> Iterator[tuple[int, Weights]]:
    """Resident records, then arrivals."""
    return itertools.chain(leases.resident(), itertools.chain.from_iterable(leases))


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def demanded(tier: Tier) -> int:
    return tier.stats.hits + tier.stats.late_hits + tier.stats.misses


# Anything in any order


class Boom(Exception):
    """Raised while experts are leased."""


layer_numbers = st.integers(0, LAYERS - 1)
expert_sets = st.lists(st.integers(0, EXPERTS - 1), unique=True, min_size=1)
any_key = st.builds(ExpertKey, layer_numbers, st.integers(0, EXPERTS - 1))
some_keys = st.lists(any_key, max_size=4)
slot_counts = st.integers(1, 8)


class Machine(RuleBasedStateMachine):
    """Uses a store like a model, or a failing model, while reads are held, hang and fail."""

    tiers = 1
    bench: Bench | None = None
    hung: ExpertKey | None = None

    @initialize(slots=st.tuples(slot_counts, slot_counts), policy=st.sampled_from(["cycle", "echo", "lru"]))
    def build(self, slots: tuple[int, int], policy: str) -> None:
        self.bench = Bench(slots[: self.tiers], policy)

    def teardown(self) -> None:
        if self.bench is not None:
            try:
                self.bench.shelf.close()
                self.bench.drain()
                self.bench.check()
            finally:
                self.bench.close()

    @invariant()
    def holds(self) -> None:
        if self.bench is not None:
            self.bench.check()

    @rule(
        layer=layer_numbers,
        experts=expert_sets,
        streaming=st.booleans(),
        stop=st.none() | st.integers(0, 3),
        boom=st.booleans(),
        predicted=some_keys,
    )
    def acquire(
        self, layer: int, experts: list[int], streaming: bool, stop: int | None, boom: bool, predicted: list[ExpertKey]
    ) -> None:
        """All experts; or the first ``stop``, then leave or raise; with 0, held reads stay held."""
        assert self.bench is not None
        bench, top = self.bench, self.bench.top
        wanted = keys(layer, *experts)
        hangs = self.hung in wanted and self.hung not in bench.resident(top)
        everywhere = set().union(*(bench.resident(tier) for tier in bench.tiers))
        must_fail = {key for key in wanted if key in bench.shelf.failing and key not in everywhere}
        warm = {key for key in bench.resident(top) if is_warm(top.residency, key)}
        before = demanded(top)
        seen: list[int] = []
        error: StorageError | None = None
        bench.store.io_timeout = SOON if hangs else WAIT
        try:
            with bench.store.acquire(layer, experts, streaming=streaming) as leases:
                if stop != 0:
                    bench.shelf.resume()
                    self._iterate(leases, layer, seen, stop, boom, [] if streaming else predicted)
        except StorageError as caught:
            error = caught
        except Boom:
            assert boom
        assert len(set(seen)) == len(seen) and set(seen) <= set(experts)
        assert len(seen) <= demanded(top) - before <= len(wanted)
        if error is not None:
            culprit = key_of(error.file)
            name = "-".join(map(str, culprit))
            assert error.tensor.startswith(name) and str(error).startswith(error.file) and error.offset > 0
            assert culprit in wanted
            assert hangs or culprit in bench.shelf.failing
        elif stop is None:
            assert not must_fail and (not hangs or self.hung in everywhere)  # a copy from below does not hang
            assert sorted(seen) == sorted(experts)
            assert demanded(top) - before == len(wanted)
            if streaming:
                assert len(warm - set(top.entries)) <= max(2, len(top.slots) // 8), "a prefill drove out warm records"

    def _iterate(
        self, leases: Leases, layer: int, seen: list[int], stop: int | None, boom: bool, predicted: list[ExpertKey]
    ) -> None:
        assert self.bench is not None
        for expert, weights in all_of(leases):
            assert is_whole(weights, ExpertKey(layer, expert))
            self.bench.predict(predicted, streaming=len(predicted) % 2 == 0)
            assert is_whole(weights, ExpertKey(layer, expert)), "a leased record was given away"
            seen.append(expert)
            if len(seen) == stop:
                if boom:
                    raise Boom
                break

    @rule(predicted=some_keys, streaming=st.booleans())
    def predict(self, predicted: list[ExpertKey], streaming: bool) -> None:
        assert self.bench is not None
        self.bench.predict(predicted, streaming)

    @rule(predicted=some_keys)
    def warm(self, predicted: list[ExpertKey]) -> None:
        assert self.bench is not None
        self.bench.store.warm(list(dict.fromkeys(predicted)))

    @rule(layer=layer_numbers, kept=st.sets(st.integers(0, EXPERTS - 1)))
    def cancel_stale(self, layer: int, kept: set[int]) -> None:
        assert self.bench is not None
        top = self.bench.top
        top.cancel_stale(layer, set(keys(layer, *kept)))
        stale = [entry for key, entry in top.entries.items() if key.layer == layer and key.expert not in kept]
        assert not any(entry.purpose is Purpose.PREFETCH for entry in stale)

    @rule()
    def settle(self) -> None:
        assert self.bench is not None
        self.bench.top.settle()

    @rule()
    def pause(self) -> None:
        """Hold reads from now on, after earlier ones have ended: a read sees the same in every run."""
        assert self.bench is not None
        self.bench.drain(self.hung)
        self.bench.shelf.pause()

    @rule()
    def resume(self) -> None:
        assert self.bench is not None
        self.bench.drain(self.hung)

    @rule(key=any_key)
    def fail(self, key: ExpertKey) -> None:
        assert self.bench is not None
        if not self.bench.shelf.paused:
            self.bench.drain(self.hung)
        self.bench.shelf.failing.add(key)

    @precondition(lambda self: self.bench is not None and self.bench.shelf.failing)
    @rule()
    def heal(self) -> None:
        assert self.bench is not None
        if not self.bench.shelf.paused:
            self.bench.drain(self.hung)
        self.bench.shelf.failing.clear()

    @precondition(lambda self: self.bench is not None and self.hung is None)
    @rule(key=any_key)
    def hang(self, key: ExpertKey) -> None:
        assert self.bench is not None
        if all(len(tier.slots) > 1 for tier in self.bench.tiers):  # it would block a single slot
            self.bench.drain()
            self.bench.shelf.hang(key)
            self.hung = key

    @rule(which=st.integers(0, 1), slots=st.integers(0, 8))
    def shrink(self, which: int, slots: int) -> None:
        """Return the memory of some slots to the system. A hanging slot must not be the last."""
        assert self.bench is not None
        tier = self.bench.tiers[which % self.tiers]
        before, least = len(tier.slots), 1 if self.hung is None else 2
        tier.shrink(slots * SIZE, least)
        assert min(before, least) <= len(tier.slots) <= before
        assert all(not tier._slots[index].filled for index in tier.residency.retired)

    @rule(which=st.integers(0, 1), slots=st.integers(0, 8))
    def grow(self, which: int, slots: int) -> None:
        assert self.bench is not None
        tier = self.bench.tiers[which % self.tiers]
        before, away = len(tier.slots), tier.retired
        assert tier.grow(slots * SIZE) == min(slots, away) * SIZE
        assert (len(tier.slots), tier.retired) == (before + min(slots, away), away - min(slots, away))

    @precondition(lambda self: self.hung is not None)
    @rule()
    def come_back(self) -> None:
        assert self.bench is not None and self.hung is not None
        self.bench.shelf.come_back(self.hung)
        self.hung = None


class TwoTierMachine(Machine):
    tiers = 2


MACHINE_SETTINGS = settings(
    deadline=None,
    derandomize=True,
    max_examples=100,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.generate, Phase.shrink],
)
TestOneTier = Machine.TestCase
TestOneTier.settings = MACHINE_SETTINGS
TestTwoTiers = TwoTierMachine.TestCase
TestTwoTiers.settings = MACHINE_SETTINGS


# Demands


@pytest.mark.parametrize("slots", [(1,), (1, 1), (1, 4), (4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_fewer_slots_than_experts(slots: tuple[int, ...], streaming: bool, policy: str) -> None:
    with bench_of(*slots, policy=policy) as bench:
        for _ in range(2):
            for layer in range(LAYERS):
                bench.use(layer, range(EXPERTS), streaming=streaming)
        assert demanded(bench.top) == 2 * LAYERS * EXPERTS


@pytest.mark.parametrize("slots", [(4,), (4, 4), (8, 4)], ids=str)
def test_resident_experts_come_first(slots: tuple[int, ...]) -> None:
    with bench_of(*slots) as bench:
        bench.use(0, [3, 4])
        bench.shelf.pause()
        with bench.store.acquire(0, [1, 3, 2, 4]) as leases:
            came = [expert for expert, _ in iterate_then(leases, 2, bench.shelf.resume)]
        assert came[:2] == [3, 4]  # no read has ended before both had come
        assert sorted(came[2:]) == [1, 2]
        stats = bench.top.stats
        assert (stats.hits, stats.late_hits, stats.misses) == (2, 0, 4)


def test_what_needs_no_record_is_not_kept_waiting_by_those_that_are_read() -> None:
    with bench_of(4) as bench:
        bench.shelf.pause()
        with bench.store.acquire(0, [1, 2]) as leases:
            assert leases.resident() == []  # while both are being read
            bench.shelf.resume()
            assert sorted(expert for batch in leases for expert, _ in batch) == [1, 2]


def iterate_then(leases: Leases, count: int, then: Callable[[], None]) -> Iterator[tuple[int, Weights]]:
    """``leases``, with a call of ``then`` after the first ``count``."""
    for number, lease in enumerate(all_of(leases), 1):
        yield lease
        if number == count:
            then()


@pytest.mark.parametrize("slots", [(4,), (4, 4), (2, 4), (4, 2)], ids=str)
def test_demand_joins_a_prefetched_read(slots: tuple[int, ...]) -> None:
    with bench_of(*slots, threads=8) as bench:
        bench.shelf.pause()
        bench.predict(keys(0, 1))
        bench.shelf.wait_for_reads(2)  # both files of it are being read
        with bench.store.acquire(0, [1, 2]) as leases:
            bench.shelf.resume()
            assert sorted(expert for expert, _ in all_of(leases)) == [1, 2]
        stats = bench.top.stats
        assert (stats.hits, stats.late_hits, stats.misses) == (0, 1, 1)
        assert (stats.prefetched, stats.useful, stats.wasted, stats.cancelled) == (1, 1, 0, 0)
        assert set(bench.shelf.reads.values()) == {1}
        bench.use(0, [1, 2])
        assert stats.hits == 2
        assert set(bench.shelf.reads.values()) == {1}


@pytest.mark.parametrize("slots", [(2,), (2, 2), (4, 2)], ids=str)
def test_prediction_of_what_is_already_wanted(slots: tuple[int, ...]) -> None:
    """A key that waits for a slot and is then predicted gets one slot and is read once."""
    with bench_of(*slots) as bench:
        bench.shelf.hang(ExpertKey(0, 5))
        bench.predict(keys(0, 5))
        bench.shelf.wait_for_reads(1)
        with bench.store.acquire(0, [0, 1]) as leases:
            came = all_of(leases)
            assert next(came)[0] == 0  # the other slot is filled with the wrong prediction
            bench.shelf.come_back(ExpertKey(0, 5))
            for key, entry in bench.top.entries.items():
                if key == ExpertKey(0, 5) and entry.ticket is not None:
                    bench.transfer.wait_any([entry.ticket], WAIT)
            bench.predict(keys(0, 1))
            assert [expert for expert, _ in came] == [1]
        bench.check()
        assert bench.shelf.reads[ExpertKey(0, 1), 0] == 1
        bench.use(0, [2, 3])


def test_demand_goes_ahead_of_predictions() -> None:
    with bench_of(8, threads=1) as bench:
        bench.shelf.pause()
        bench.predict(keys(1, 0, 1, 2))
        bench.shelf.wait_for_reads(1)
        with bench.store.acquire(0, [5]) as leases:
            bench.shelf.resume()
            assert [expert for expert, _ in all_of(leases)] == [5]
        bench.drain()
        order = list(bench.shelf.reads)
        assert order.index((ExpertKey(0, 5), 1)) < order.index((ExpertKey(1, 0), 1))


@pytest.mark.parametrize("slots", [(4,), (4, 4)], ids=str)
def test_prediction_of_what_is_resident_reads_nothing(slots: tuple[int, ...]) -> None:
    with bench_of(*slots) as bench:
        bench.use(0, [1])
        bench.predict(keys(0, 1, 1))
        bench.drain()
        assert sum(bench.shelf.reads.values()) == 2
        assert bench.top.stats.prefetched == 0


@pytest.mark.parametrize("slots", [(2,), (4,), (17,), (4, 4), (17, 4)], ids=str)
def test_predictions_of_a_prefill_leave_slots_to_its_demands(slots: tuple[int, ...]) -> None:
    with bench_of(*slots) as bench:
        bench.use(2, range(slots[-1]))  # all slots are warm
        for _ in range(2):
            bench.predict(keys(1, *range(EXPERTS)), streaming=True)
            bench.drain()
        bench.use(0, range(EXPERTS), streaming=True)
        bench.check()
        for layer in (1, 0, 1, 0):  # predictions may now take the slots that the last layer streamed through
            for _ in range(3):
                bench.predict(keys(1 - layer, *range(EXPERTS)), streaming=True)
                bench.drain()
            bench.use(layer, range(EXPERTS), streaming=True)
            bench.check()


def test_a_machine_short_of_memory_is_not_warmed_up() -> None:
    bench = Bench((8,), threads=2)
    bench.shelf.pause()
    bench.store.warm([ExpertKey(0, expert) for expert in range(8)])
    bench.shelf.wait_for_reads(1)
    bench.top.shrink(SIZE, least=2)
    begun = set(bench.top.entries)
    assert 1 <= len(begun) <= 2 and bench.top.retired >= 1
    bench.check()
    bench.drain()
    assert set(bench.top.entries) == begun and bench.top.stats.warmed == len(begun)
    bench.check()
    bench.close()


@pytest.mark.parametrize("slots", [(4,), (7,), (16,), (4, 7), (2, 7), (1, 16)], ids=str)
def test_predictions_leave_warm_records_alone(slots: tuple[int, ...]) -> None:
    """All slots are warm; predictions get at most an eighth of them, however many there are."""
    with bench_of(*slots) as bench:
        count = slots[-1]
        bench.use(0, range(count // 2))
        bench.use(1, range(count - count // 2))
        warm = set(bench.top.entries)
        assert len(warm) == count
        for _ in range(5):
            bench.predict(keys(2, *range(EXPERTS)))
            bench.drain()
        assert len(warm - set(bench.top.entries)) <= max(1, count // 8)


@pytest.mark.parametrize("slots", [(4,), (4, 4)], ids=str)
def test_stale_predictions_are_dropped(slots: tuple[int, ...]) -> None:
    """Reads that have not begun are dropped; records whose reads have begun leave first."""
    with bench_of(*slots, threads=1) as bench:
        bench.shelf.pause()
        bench.predict(keys(1, 0, 1, 2))
        bench.shelf.wait_for_reads(1)
        with bench.store.acquire(1, [5]) as leases:
            bench.shelf.resume()
            assert [expert for expert, _ in all_of(leases)] == [5]
        bench.drain()
        stats = bench.top.stats
        assert stats.prefetched == 3
        assert stats.cancelled + stats.wasted == 3
        assert stats.useful == 0
        if len(slots) == 1:
            assert stats.cancelled == 2
            assert {key for key, _ in bench.shelf.reads} == set(keys(1, 0, 5))
            bench.use(0, [0, 1])
            bench.use(2, [0])
            assert set(bench.top.entries) == {*keys(1, 5), *keys(0, 0, 1), *keys(2, 0)}


# Prefill


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("below", "slots"), [(None, 3), (None, 24), (1, 8), (2, 4), (3, 6), (4, 16), (20, 8), (40, 24)]
)
def test_prefill_leaves_warm_records(policy: str, slots: int, below: int | None) -> None:
    """A prefill that streams far more than fits, whatever room the tier below has."""
    with bench_of(*([slots] if below is None else [below, slots]), policy=policy, layers=4) as bench:
        for _ in range(3):
            bench.use(0, range(slots // 2))
            bench.use(1, range(slots - slots // 2))
        warm = set(bench.top.entries)
        assert len(warm) == slots
        for layer in (2, 3):
            bench.use(layer, range(30), streaming=True)
        kept = warm & set(bench.top.entries)
        assert len(kept) >= slots - max(2, slots // 8)


@pytest.mark.parametrize("below", [3, 4, 8, 16])
def test_prefill_through_two_tiers_ends(below: int) -> None:
    """Both tiers full of warm records, with room above: each record on its way up needs a slot in both."""
    with bench_of(below, 4) as bench:
        for layer in range(LAYERS):
            bench.use(layer, range(EXPERTS))
        for _ in range(3):
            for layer in range(LAYERS):
                bench.use(layer, range(20), streaming=True)


def test_prefill_that_hits_counts_as_use() -> None:
    with bench_of(4) as bench:
        bench.use(0, [0, 1, 2, 3])
        bench.use(0, [0, 1], streaming=True)
        assert bench.top.stats.hits == 2
        assert set(bench.top.entries) == set(keys(0, 0, 1, 2, 3))


def test_prefill_of_an_empty_store_fills_it() -> None:
    with bench_of(4) as bench:
        bench.use(0, range(4), streaming=True)
        assert set(bench.top.entries) == set(keys(0, 0, 1, 2, 3))
        bench.use(0, range(4))
        assert bench.top.stats.hits == 4


# Failures


@pytest.mark.parametrize("slots", [(1,), (4,), (1, 1), (4, 4), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("streaming", [False, True])
def test_failed_read_names_itself(slots: tuple[int, ...], streaming: bool) -> None:
    with bench_of(*slots) as bench:
        bench.shelf.failing.add(ExpertKey(1, 2))
        for _ in range(3):
            with pytest.raises(StorageError, match="made to fail") as caught:
                bench.use(1, [0, 2, 3], streaming=streaming)
            assert Path(caught.value.file).name in ("1-2-0", "1-2-1")
            assert (caught.value.tensor, caught.value.offset) in [("1-2.gate_proj", 128), ("1-2.down_proj", 5000)]
            bench.drain()
            bench.check()
            bench.use(1, [0, 3, 4], streaming=streaming)
        bench.shelf.failing.clear()
        bench.use(1, [0, 2, 3], streaming=streaming)


def test_a_prediction_that_fails_is_read_again_for_the_demand_that_joined_it() -> None:
    with bench_of(4) as bench:
        key = ExpertKey(1, 2)
        bench.shelf.failing.add(key)
        bench.shelf.pause()
        bench.predict([key])
        bench.shelf.wait_for_reads(1)
        with bench.store.acquire(1, [2]) as leases:
            ticket = bench.top.entries[key].ticket
            assert ticket is not None
            bench.shelf.resume()
            bench.transfer.wait_any([ticket], WAIT)
            bench.shelf.failing.clear()
            assert [expert for expert, _ in all_of(leases)] == [2]
        assert demanded(bench.top) == 1
        bench.check()


def test_predictions_that_took_over_the_streaming_slots_are_no_deadlock() -> None:
    with bench_of(17) as bench:
        bench.use(2, range(17))  # all slots are warm
        bench.use(0, range(EXPERTS), streaming=True)  # the streaming slots are the first to leave
        bench.predict(keys(1, *range(EXPERTS)), streaming=True)
        bench.drain()
        bench.use(0, range(20, 26), streaming=True)
        bench.check()


@pytest.mark.parametrize("slots", [(4,), (4, 4)], ids=str)
def test_failed_prediction_is_forgotten(slots: tuple[int, ...]) -> None:
    with bench_of(*slots) as bench:
        bench.shelf.failing.add(ExpertKey(1, 2))
        bench.predict(keys(1, 2))
        bench.drain()
        assert ExpertKey(1, 2) not in bench.top.entries
        bench.shelf.failing.clear()
        bench.use(1, [2])
        assert bench.top.stats.misses == 1
        assert bench.top.stats.wasted == 1


@pytest.mark.parametrize("slots", [(2,), (2, 2), (4, 2), (2, 4)], ids=str)
def test_stalled_read_names_itself_and_blocks_nothing_else(slots: tuple[int, ...]) -> None:
    with bench_of(*slots) as bench:
        bench.shelf.hang(ExpertKey(0, 3))
        bench.store.io_timeout = SOON
        with pytest.raises(StorageError, match="stalled") as caught:
            bench.use(0, [3])
        assert (caught.value.file, caught.value.tensor, caught.value.offset) == ("/shelf/0-3-0", "0-3.gate_proj", 128)
        bench.store.io_timeout = WAIT
        bench.use(0, [0, 1, 2, 4])
        bench.use(1, range(EXPERTS))
        bench.shelf.come_back(ExpertKey(0, 3))
        bench.use(0, [3])
        assert bench.shelf.reads[ExpertKey(0, 3), 0] == 1  # the same read


def test_read_that_hangs_comes_last() -> None:
    with bench_of(4) as bench:
        bench.shelf.hang(ExpertKey(0, 3))
        with bench.store.acquire(0, [3, 1, 2]) as leases:
            came = all_of(leases)
            assert {next(came)[0], next(came)[0]} == {1, 2}
            bench.store.io_timeout = SOON
            with pytest.raises(StorageError, match="stalled"):
                next(came)
        bench.store.io_timeout = WAIT
        bench.shelf.come_back(ExpertKey(0, 3))
        bench.use(0, [1, 2, 3])
        assert bench.top.stats.late_hits + bench.top.stats.hits == 3


def test_what_has_just_arrived_is_not_waited_for() -> None:
    """A read may end between the check for ready records and the wait."""
    with bench_of(2) as bench, bench.store.acquire(0, [3]) as leases:
        bench.drain()
        bench.store.wait(list(leases._leased.values()))


@pytest.mark.parametrize("slots", [(2,), (2, 2)], ids=str)
def test_error_inside_ends_all_leases(slots: tuple[int, ...]) -> None:
    with bench_of(*slots) as bench:

        def use() -> None:
            with bench.store.acquire(0, [0, 1, 2, 3]) as leases:
                for _ in leases:
                    raise Boom

        with pytest.raises(Boom):
            use()
        bench.drain()
        bench.check()
        bench.use(1, range(EXPERTS))


def test_nothing_wanted() -> None:
    with bench_of(2) as bench:
        assert bench.use(0, []) == []


# Trunks stream through a ring of the same tiers


@contextmanager
def trunks_of(count: int, resident: int, tiers: int) -> Iterator[tuple[Bench, Trunks]]:
    """``count`` trunks: the first ``resident`` stay in the top tier, and every tier has a ring of two slots.

    Built as at run time, one Trunks a tier.
    """
    order = [TrunkKey(layer) for layer in range(count)]
    with bench_of(*[2] * (tiers - 1), resident + 2, policy="lru", layers=count) as bench:
        for below in bench.tiers[:-1]:
            Trunks(below, [], order, record_of, WAIT)
        trunks = Trunks(bench.top, order[:resident], order, record_of, WAIT)
        assert list(trunks.load()) == [SIZE] * resident
        yield bench, trunks
        for entry in bench.top.entries.values():
            entry.pins = 0  # held until the model is closed


@pytest.mark.parametrize("tiers", [1, 2])
@pytest.mark.parametrize("resident", [0, 1, 3])
def test_trunks_come_in_their_cycle(tiers: int, resident: int) -> None:
    with trunks_of(5, resident, tiers) as (_, trunks):
        for _ in range(3):
            for layer in range(5):
                assert is_whole(trunks.get(TrunkKey(layer)), TrunkKey(layer))


@pytest.mark.parametrize("tiers", [1, 2])
@pytest.mark.parametrize("resident", [0, 1, 3, 8])
def test_next_trunk_is_on_its_way(tiers: int, resident: int) -> None:
    """While one trunk is used, the next streaming one is being read, not only in the first cycle."""
    count = resident + 4
    with trunks_of(count, resident, tiers) as (bench, trunks):
        for cycle in range(3):
            for layer in range(count):
                trunks.get(TrunkKey(layer))
                assert TrunkKey((layer + 1) % count) in bench.top.entries, f"cycle {cycle}, layer {layer}"
                bench.drain()


def test_trunk_that_failed_comes_when_it_can() -> None:
    with trunks_of(4, 0, 1) as (bench, trunks):
        bench.shelf.failing.add(TrunkKey(1))
        trunks.get(TrunkKey(0))
        bench.drain()
        with pytest.raises(StorageError, match="made to fail"):
            trunks.get(TrunkKey(1))
        bench.shelf.failing.clear()
        for layer in (1, 2, 3, 0):
            assert is_whole(trunks.get(TrunkKey(layer)), TrunkKey(layer))
