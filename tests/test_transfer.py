"""The transfer threads: order, promotion, cancellation, failure, waiting and closing.

Gates make the order: one thread is held inside a job while the queue is filled.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from at_once import AtOnce
from made_jobs import Call

from tierlm.memory.ticket import Job, State, Ticket
from tierlm.memory.transfer import Transfer
from tierlm.policies.residency import Purpose

WAIT = 60.0  # seconds; reached only by a test that fails


class Broken(Exception):
    """Raised by a job."""


class Stalled(Exception):
    """The error of a job that stalls."""


@dataclass
class Bench:
    """A transfer, the names of the jobs in the order they ran, and gates that open automatically at the end."""

    transfer: Transfer
    ran: list[str] = field(default_factory=list)
    gates: list[threading.Event] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def job(self, name: str, then: Callable[[], None] | None = None, nbytes: int = 1, link: str = "link") -> Job:
        def run() -> None:
            with self.lock:
                self.ran.append(name)
            if then is not None:
                then()

        return Call(link, nbytes, name, run, lambda what: Stalled(f"{name} {what}"))

    def submit(self, *names: str, prefetched: bool = False, after: Ticket | None = None) -> Ticket:
        purpose = Purpose.PREFETCH if prefetched else Purpose.DEMAND
        return self.transfer.submit([self.job(name) for name in names], purpose=purpose, after=after)

    def hold(self, name: str, error: Exception | None = None) -> tuple[Ticket, threading.Event]:
        """A ticket that occupies a thread, and the gate that lets it end, or fail with ``error``."""
        inside, gate = threading.Event(), threading.Event()
        self.gates.append(gate)

        def then() -> None:
            inside.set()
            assert gate.wait(WAIT)
            if error is not None:
                raise error

        ticket = self.transfer.submit([self.job(name, then)])
        assert inside.wait(WAIT)
        return ticket, gate

    def finish(self, *tickets: Ticket) -> None:
        for ticket in tickets:
            self.transfer.wait_any([ticket], WAIT)


def bench_of(threads: int) -> Iterator[Bench]:
    bench = Bench(Transfer(threads))
    yield bench
    for gate in bench.gates:
        gate.set()
    assert bench.transfer.close(WAIT)


@pytest.fixture
def one() -> Iterator[Bench]:
    """One thread."""
    yield from bench_of(1)


@pytest.fixture
def two() -> Iterator[Bench]:
    """Two threads."""
    yield from bench_of(2)


def fail(error: BaseException) -> Callable[[], None]:
    def then() -> None:
        raise error

    return then


# Order


def test_demand_goes_ahead_of_prefetched(one: Bench) -> None:
    _, gate = one.hold("held")
    predictions = [one.submit("prediction 1", prefetched=True), one.submit("prediction 2", prefetched=True)]
    demands = [one.submit("demand 1"), one.submit("demand 2")]
    gate.set()
    one.finish(*predictions, *demands)
    assert one.ran == ["held", "demand 1", "demand 2", "prediction 1", "prediction 2"]


def test_promoted_ticket_becomes_a_demand(one: Bench) -> None:
    _, gate = one.hold("held")
    first = one.submit("prediction 1", prefetched=True)
    second = one.submit("prediction 2a", "prediction 2b", prefetched=True)
    demand = one.submit("demand")
    one.transfer.promote(second)
    assert second.purpose is Purpose.DEMAND
    gate.set()
    one.finish(first, second, demand)
    assert one.ran == ["held", "demand", "prediction 2a", "prediction 2b", "prediction 1"]


def test_promote_reaches_what_the_ticket_waits_for(one: Bench) -> None:
    _, gate = one.hold("held")
    other = one.submit("other", prefetched=True)
    below = one.submit("below", prefetched=True)
    above = one.submit("above", prefetched=True, after=below)
    one.transfer.promote(above)
    gate.set()
    one.finish(other, above)
    assert one.ran == ["held", "below", "above", "other"]


def test_promote_is_harmless_when_late(one: Bench) -> None:
    ticket = one.submit("prediction", prefetched=True)
    one.finish(ticket)
    one.transfer.promote(ticket)
    demand = one.submit("demand")
    one.transfer.promote(demand)
    one.finish(demand)
    assert one.ran == ["prediction", "demand"]


def test_after_runs_behind_and_before_the_queue(one: Bench) -> None:
    """What waited for a finished ticket goes first: its slot below waits for it."""
    first, gate = one.hold("first")
    queued = one.submit("queued")
    dependents = [one.submit("then 1", "then 2", after=first)]
    dependents.append(one.submit("last", after=dependents[0]))
    assert not dependents[0].done
    gate.set()
    one.finish(queued, *dependents)
    assert one.ran == ["first", "then 1", "then 2", "last", "queued"]


def test_after_waits_for_all_jobs(two: Bench) -> None:
    gate = threading.Event()
    two.gates.append(gate)
    slow = two.job("slow", lambda: assert_set(gate.wait(WAIT)))
    below = two.transfer.submit([slow, two.job("quick")])
    above = two.submit("above", after=below)
    two.finish(two.submit("other"))  # the free thread has emptied the queue
    assert "above" not in two.ran
    gate.set()
    two.finish(above)
    assert two.ran[-1] == "above"


def assert_set(was_set: bool) -> None:
    assert was_set


def test_after_a_ticket_that_is_done(one: Bench) -> None:
    first = one.submit("first")
    one.finish(first)
    second = one.submit("second", after=first)
    one.finish(second)
    assert second.error is None and not second.cancelled
    assert one.ran == ["first", "second"]


# Cancellation


def test_cancelled_ticket_never_runs(one: Bench) -> None:
    _, gate = one.hold("held")
    prediction = one.submit("prediction a", "prediction b", prefetched=True)
    assert one.transfer.cancel(prediction)
    assert prediction.done and prediction.cancelled and prediction.error is None
    one.transfer.wait_any([prediction], 0)  # it counts as done
    gate.set()
    one.finish(one.submit("last", prefetched=True))
    assert one.ran == ["held", "last"]


def test_promoted_ticket_can_be_cancelled(one: Bench) -> None:
    _, gate = one.hold("held")
    prediction = one.submit("prediction", prefetched=True)
    one.transfer.promote(prediction)
    assert one.transfer.cancel(prediction)
    gate.set()
    one.finish(one.submit("last"))
    assert one.ran == ["held", "last"]


def test_too_late_to_cancel(one: Bench) -> None:
    ticket, gate = one.hold("held")
    assert not one.transfer.cancel(ticket)
    gate.set()
    one.finish(ticket)
    assert not one.transfer.cancel(ticket)
    assert not ticket.cancelled and ticket.error is None


def test_too_late_to_cancel_once_one_job_has_begun(one: Bench) -> None:
    inside, gate = threading.Event(), threading.Event()
    one.gates.append(gate)

    def then() -> None:
        inside.set()
        assert gate.wait(WAIT)

    ticket = one.transfer.submit([one.job("a", then), one.job("b")], purpose=Purpose.PREFETCH)
    assert inside.wait(WAIT)
    assert not one.transfer.cancel(ticket)
    gate.set()
    one.finish(ticket)
    assert one.ran == ["a", "b"]
    assert not ticket.cancelled


def test_cancelled_twice(one: Bench) -> None:
    _, _gate = one.hold("held")
    prediction = one.submit("prediction", prefetched=True)
    assert one.transfer.cancel(prediction)
    assert not one.transfer.cancel(prediction)


def test_cancellation_reaches_dependents(one: Bench) -> None:
    _, gate = one.hold("held")
    below = one.submit("below", prefetched=True)
    above = one.submit("above", prefetched=True, after=below)
    top = one.submit("top", prefetched=True, after=above)
    assert one.transfer.cancel(below)
    assert above.done and above.cancelled and top.done and top.cancelled
    gate.set()
    one.finish(one.submit("last", prefetched=True))
    assert one.ran == ["held", "last"]


def test_cancelled_dependent_leaves_the_one_below(one: Bench) -> None:
    below, gate = one.hold("below")
    above = one.submit("above", prefetched=True, after=below)
    assert one.transfer.cancel(above)
    assert not below.done
    gate.set()
    one.finish(below)
    assert below.error is None and not below.cancelled
    one.finish(one.submit("last", prefetched=True))
    assert one.ran == ["below", "last"]


def test_submitted_after_a_cancelled_ticket(one: Bench) -> None:
    """It never runs, and says so: done without error and not cancelled would mean success."""
    _, gate = one.hold("held")
    below = one.submit("below", prefetched=True)
    assert one.transfer.cancel(below)
    above = one.submit("above", after=below)
    assert above.done and above.cancelled and above.error is None
    gate.set()
    one.finish(one.submit("last"))
    assert one.ran == ["held", "last"]


# Failure


@pytest.mark.parametrize("error", [Broken("disk"), SystemExit(3), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_failure_is_the_tickets_and_the_thread_lives(one: Bench, error: BaseException) -> None:
    ticket = one.transfer.submit([one.job("bad", fail(error), nbytes=7)])
    one.finish(ticket)
    assert ticket.done and ticket.error is error and not ticket.cancelled
    healthy = one.submit("healthy")
    one.finish(healthy)
    assert healthy.error is None
    assert one.transfer.busy()["link"].bytes == 1  # a failed job moved nothing


def test_failure_skips_the_rest_of_the_ticket(one: Bench) -> None:
    error = Broken("disk")
    ticket = one.transfer.submit([one.job("a"), one.job("b", fail(error)), one.job("c")])
    one.finish(ticket)
    assert ticket.error is error
    assert one.ran == ["a", "b"]


def test_failed_ticket_is_done_when_no_job_is_in_it(two: Bench) -> None:
    """Until then a thread may still be writing to its slot."""
    inside, gate = threading.Event(), threading.Event()
    two.gates.append(gate)

    def slow() -> None:
        inside.set()
        assert gate.wait(WAIT)

    error = Broken("disk")
    ticket = two.transfer.submit([two.job("slow", slow), two.job("bad", lambda: (inside.wait(WAIT), fail(error)())[0])])
    other = two.submit("other")
    two.finish(other)  # by the thread that failed before
    assert ticket.error is error
    assert not ticket.done
    gate.set()
    two.finish(ticket)
    assert ticket.error is error


def test_failure_reaches_dependents(one: Bench) -> None:
    error = Broken("disk")
    below, gate = one.hold("below", error)
    above = one.submit("above", after=below)
    top = one.submit("top", after=above)
    gate.set()
    one.finish(top)
    assert above.done and above.error is error and top.error is error
    assert not above.cancelled
    late = one.submit("late", after=below)
    assert late.done and late.error is error
    one.finish(one.submit("last"))
    assert one.ran == ["below", "last"]


# Waiting


def test_wait_any_returns_with_the_first(two: Bench) -> None:
    slow, _gate = two.hold("slow")
    quick = two.submit("quick")
    two.transfer.wait_any([slow, quick], WAIT)
    assert quick.done and not slow.done


def test_wait_any_raises_the_stalled_jobs_error(one: Bench) -> None:
    slow, gate = one.hold("slow")
    with pytest.raises(Stalled, match=r"^slow stalled: nothing came for 0\.01 s$"):
        one.transfer.wait_any([slow], 0.01)
    gate.set()
    one.finish(slow)  # a stall does not end it
    assert slow.error is None


def test_stall_of_the_job_that_is_left(two: Bench) -> None:
    gate, inside = threading.Event(), threading.Event()
    two.gates.append(gate)

    def slow() -> None:
        inside.set()
        assert gate.wait(WAIT)

    ticket = two.transfer.submit([two.job("quick"), two.job("slow", slow)])
    assert inside.wait(WAIT)
    two.finish(two.submit("other"))  # by the thread that finished "quick"
    with pytest.raises(Stalled, match="slow"):
        two.transfer.wait_any([ticket], 0.01)


def test_stall_names_what_the_ticket_waits_for(one: Bench) -> None:
    below, _gate = one.hold("below")
    above = one.submit("above", after=below)
    top = one.submit("top", after=above)
    with pytest.raises(Stalled, match="below"):
        one.transfer.wait_any([top], 0.01)


def test_wait_wakes_other_threads(two: Bench) -> None:
    """Several waiters on several tickets."""
    held = [two.hold("a"), two.hold("b")]
    errors: list[BaseException] = []

    def wait(ticket: Ticket) -> None:
        try:
            two.transfer.wait_any([ticket], WAIT)
        except BaseException as error:
            errors.append(error)

    waiters = [threading.Thread(target=wait, args=(ticket,)) for ticket, _ in held]
    for waiter in waiters:
        waiter.start()
    for _, gate in reversed(held):
        gate.set()
    for waiter in waiters:
        waiter.join(WAIT)
    assert not any(waiter.is_alive() for waiter in waiters)
    assert errors == []


# Accounts


def test_busy_counts_bytes_per_link(one: Bench) -> None:
    ticket = one.transfer.submit(
        [one.job("a", nbytes=3, link="disk->ram"), one.job("b", nbytes=4, link="disk->ram")],
        purpose=Purpose.PREFETCH,
    )
    other = one.transfer.submit([one.job("c", nbytes=5, link="ram->vram")], after=ticket)
    one.finish(other)
    busy = one.transfer.busy()
    assert {name: link.bytes for name, link in busy.items()} == {"disk->ram": 7, "ram->vram": 5}
    assert all(link.seconds >= 0 and link.active == 0 for link in busy.values())


def test_nothing_is_lost_under_load() -> None:
    """Many tickets of all kinds over four threads: each job runs once, or belongs to a cancelled ticket."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        bench = Bench(Transfer(4))
        tickets: list[tuple[str, Ticket]] = []
        for i in range(300):
            after = tickets[-1][1] if i % 5 == 4 else None
            tickets.append((f"{i}", bench.submit(f"{i} a", f"{i} b", prefetched=i % 2 == 0, after=after)))
            if i % 7 == 6:
                bench.transfer.cancel(tickets[-2][1])
            if i % 3 == 2:
                bench.transfer.promote(tickets[-3][1])
        bench.finish(*(ticket for _, ticket in tickets))
        assert bench.transfer.close(WAIT)
    finally:
        sys.setswitchinterval(interval)
    expected = {f"{name} {part}" for name, ticket in tickets if not ticket.cancelled for part in "ab"}
    assert len(bench.ran) == len(set(bench.ran))
    assert set(bench.ran) == expected


# Closing


def test_close_joins_the_threads() -> None:
    before = threading.active_count()
    transfer = Transfer(3)
    assert threading.active_count() == before + 3
    assert transfer.close(WAIT)
    assert threading.active_count() == before
    assert transfer.close(WAIT)  # again


def test_submit_after_close_raises() -> None:
    bench = Bench(Transfer(1))
    ticket = bench.submit("first")
    bench.finish(ticket)
    assert bench.transfer.close(WAIT)
    with pytest.raises(RuntimeError, match="closed"):
        bench.submit("late")
    with pytest.raises(RuntimeError, match="closed"):
        bench.submit("late", after=ticket)
    assert bench.ran == ["first"]


def test_close_drops_what_is_queued_and_says_who_is_stuck() -> None:
    bench = Bench(Transfer(1))
    held, gate = bench.hold("held")
    bench.submit("queued")
    bench.submit("prediction", prefetched=True)
    bench.submit("above", after=held)
    assert not bench.transfer.close(0.01)
    gate.set()
    assert bench.transfer.close(WAIT)
    assert bench.ran == ["held"]
    assert held.done and held.error is None


# --- a last job, which needs the others


def test_a_last_job_runs_after_the_others_and_before_what_waits(one: Bench) -> None:
    ticket, gate = one.hold("first")
    queued = one.transfer.submit([one.job("a"), one.job("b")], last=one.job("last"))
    behind = one.submit("behind")
    gate.set()
    one.transfer.wait_any([behind], WAIT)
    assert ticket.done and queued.done and queued.error is None
    assert one.ran == ["first", "a", "b", "last", "behind"]


def test_a_last_job_that_fails_fails_the_ticket(one: Bench) -> None:
    queued = one.transfer.submit([one.job("a")], last=one.job("last", fail(Broken())))
    after = one.submit("after", after=queued)
    one.transfer.wait_any([after], WAIT)
    assert isinstance(queued.error, Broken) and isinstance(after.error, Broken)
    assert one.ran == ["a", "last"]


def test_a_last_job_does_not_run_after_a_failure(one: Bench) -> None:
    queued = one.transfer.submit([one.job("a", fail(Broken())), one.job("b")], last=one.job("last"))
    one.transfer.wait_any([queued], WAIT)
    assert isinstance(queued.error, Broken) and "last" not in one.ran


def test_a_ticket_is_not_cancelled_before_its_last_job(one: Bench) -> None:
    inside, gate = threading.Event(), threading.Event()
    one.gates.append(gate)

    def wait() -> None:
        inside.set()
        assert gate.wait(WAIT)

    queued = one.transfer.submit([one.job("a")], last=one.job("last", wait))
    assert inside.wait(WAIT)
    assert not queued.done and not one.transfer.cancel(queued)
    gate.set()
    one.transfer.wait_any([queued], WAIT)
    assert queued.done and not queued.cancelled and one.ran == ["a", "last"]


# --- states, and an executor without threads


def test_states_of_a_ticket(one: Bench) -> None:
    held, gate = one.hold("held")
    queued, dropped = one.submit("queued"), one.submit("dropped")
    broken = one.transfer.submit([one.job("broken", fail(Broken()))])
    behind = one.submit("behind", after=broken)
    assert one.transfer.cancel(dropped)
    found = [ticket.state for ticket in (held, queued, dropped, broken, behind)]
    assert found == [State.BEGUN, State.WAITING, State.CANCELLED, State.WAITING, State.WAITING]
    gate.set()
    one.finish(held, queued, behind)
    found = [ticket.state for ticket in (held, queued, dropped, broken, behind)]
    assert found == [State.ARRIVED, State.ARRIVED, State.CANCELLED, State.FAILED, State.FAILED]


def test_an_executor_without_threads() -> None:
    before = threading.active_count()
    bench = Bench(Transfer(1, executor=AtOnce()))
    below = bench.transfer.submit([bench.job("a"), bench.job("b")], last=bench.job("last"))
    assert bench.ran == ["a", "b"] and below.state is State.WAITING and threading.active_count() == before
    above = bench.submit("above", after=below)
    assert below.state is above.state is State.ARRIVED and bench.ran == ["a", "b", "last", "above"]
    broken = bench.transfer.submit([bench.job("c", fail(Broken())), bench.job("d")])
    bench.transfer.wait_any([broken], 0)
    assert broken.state is State.FAILED and isinstance(broken.error, Broken)
    assert bench.transfer.busy()["link"].bytes == 4 and bench.transfer.close()
