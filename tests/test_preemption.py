"""Answers that grow in a KV cache too small for all: each gets the tokens that it gets alone, whoever gives way."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierlm import LLM, Budget, SamplingParams, UsageError
from tierlm.engine import scheduler as module
from tierlm.engine.scheduler import Scheduler
from tierlm.engine.sequence import AGING, Keep, Pace, Progress, Sequence

RAM = Budget("8GiB")
CONTEXT = 60
PROMPTS = [[5, 9, 23], [7] * 30, [64, 2, 111, 12, 40], [7] * 30 + [8, 9], [100, 2, 50] * 4, [17]]
LONG = SamplingParams(max_new_tokens=CONTEXT, ignore_eos=True)  # as a chat without max_tokens
SEEDED = replace(LONG, temperature=1.0, seed=3)


@pytest.fixture(scope="module", params=["v3", "qwen3-next"])
def folder(request: Any, originals: Callable[[str], Path]) -> Path:
    """A model with a cache of tokens, and one with states."""
    return originals(request.param)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """The tests run a scheduler of their own: its thread, which sees another without requests, sleeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROOM", 4)
        with LLM.load(folder, budget=RAM, context=CONTEXT, prefill_chunk=16) as llm:
            runtime, its = llm._loaded(), llm._loaded().scheduler
            own = Scheduler(its.decoder, its.cache, its.meter, None, its.eos, its.chunk)
            llm._runtime = replace(runtime, scheduler=own)
            yield llm


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[tuple[int, bool], list[int]]:
    """What each prompt gives alone, by its number and whether it is sampled."""
    with LLM.load(folder, budget=RAM, context=CONTEXT, prefill_chunk=16) as llm:
        return {
            (at, sampled): llm.generate([PROMPTS[at]], SEEDED if sampled else LONG)[0].ids
            for at, sampled in itertools.product(range(len(PROMPTS)), (False, True))
        }


def scheduler_of(llm: LLM) -> Scheduler:
    return llm._loaded().scheduler


def made(prompt: list[int], params: SamplingParams = LONG, at: float = 0.0, **more: Any) -> Sequence:
    """A sequence that came at the second ``at``."""
    return Sequence(prompt, params, SimpleQueue[Progress](), submitted=at, **{"pace": Pace.END, **more})


def step(scheduler: Scheduler) -> None:
    scheduler.step(lambda batch: None)


def finish(scheduler: Scheduler, *sequences: Sequence) -> list[list[int]]:
    """Run until all of ``sequences`` have ended. Returns their new ids."""
    for _ in range(1000):
        if not all(sequence.ended for sequence in sequences):
            step(scheduler)
    assert all(sequence.ended for sequence in sequences), "no progress"
    return [sequence.ids for sequence in sequences]


def check(scheduler: Scheduler) -> None:
    """What holds between two steps."""
    running, waiting = scheduler._running, scheduler._waiting
    for queue in (running, waiting):
        assert [one.rank for one in queue] == sorted(one.rank for one in queue)
    spans = [one.span for one in running if one.span is not None] + [kept.span for kept in scheduler._prefixes._kept]
    assert len(spans) == len(scheduler.cache._spans) and not any(one.span for one in waiting)
    ends = sorted((span.start, span.start + span.capacity) for span in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends)) and (not ends or ends[-1][1] <= CONTEXT)


@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schedule(data: st.DataObject, llm: LLM, alone: dict[tuple[int, bool], list[int]]) -> None:
    """Lengths, priorities, readers that pause, cancels and prompts shared, at random. Nothing is left."""
    scheduler = scheduler_of(llm)
    try:
        run_any(data, scheduler, llm.vocab, alone)
    finally:
        scheduler.cancel([*scheduler._running, *scheduler._waiting])
    gc.collect()  # the values that are kept go with their owner, whom hypothesis may hold in a cycle
    scheduler.submit([last := made([3], replace(LONG, max_new_tokens=1))])  # what nobody owns leaves
    finish(scheduler, last)
    assert not scheduler._running and not scheduler._waiting
    assert scheduler.cache.free == CONTEXT and scheduler.cache.can_reserve(CONTEXT)


def run_any(data: st.DataObject, scheduler: Scheduler, vocab: int, alone: dict[tuple[int, bool], list[int]]) -> None:
    keeps = [None, Keep(), Keep()]  # not drawn themselves: a strategy holds what it draws from
    live: list[tuple[Sequence, list[int], list[int]]] = []  # a sequence, what it gets, what was read of it
    acts = ["start", "start", "step", "step", "step", "steps", "read", "cancel", "logits"]
    for second in range(data.draw(st.integers(1, 25))):
        act = data.draw(st.sampled_from(acts))
        if act == "start":
            at, sampled = data.draw(st.integers(0, len(PROMPTS) - 1)), data.draw(st.booleans())
            new, priority = data.draw(st.integers(1, CONTEXT)), data.draw(st.integers(-1, 1))
            params = replace(SEEDED if sampled else LONG, max_new_tokens=new, priority=priority)
            pace, which = data.draw(st.sampled_from(list(Pace))), data.draw(st.integers(0, 2))
            sequence = made(PROMPTS[at], params, float(second), pace=pace, keep=keeps[which])
            scheduler.submit([sequence])
            live.append((sequence, alone[at, sampled][:new], []))
        elif act == "logits":
            scheduler.submit(
                [sequence := made(PROMPTS[1], at=float(second), logits=torch.full((30, vocab), torch.nan))]
            )
            live.append((sequence, [], []))
        elif act in ("step", "steps"):
            for _ in range(1 if act == "step" else 10):
                if scheduler.wanted:
                    step(scheduler)
                    check(scheduler)
        elif live and act == "read":
            read(scheduler, live[data.draw(st.integers(0, len(live) - 1))])
        elif live:
            sequence, _, _ = live.pop(data.draw(st.integers(0, len(live) - 1)))
            scheduler.cancel([sequence])
            check(scheduler)
    for _ in range(2000):
        for one in live:
            read(scheduler, one)
        if all(sequence.ended for sequence, _, _ in live):
            break
        step(scheduler)
        check(scheduler)
    for sequence, expected, found in live:
        assert sequence.ended, "no progress"
        assert found == expected and sequence.finish == "length"
        assert sequence.logits is None or torch.isfinite(sequence.logits).all()


def read(scheduler: Scheduler, one: tuple[Sequence, list[int], list[int]]) -> None:
    """The client of a sequence takes what is there, and asks for more."""
    sequence, _, found = one
    while not sequence.mailbox.empty():
        progress = sequence.mailbox.get()  # type: ignore[attr-defined]
        assert progress.error is None
        found += progress.ids
    scheduler.ask([sequence])


# --- who gives way, and what it costs


def computed(scheduler: Scheduler) -> int:
    return scheduler.counters.prefill.tokens


def new(scheduler: Scheduler) -> int:
    return scheduler.counters.decode.tokens + scheduler.counters.first_tokens


def test_answers_without_a_limit_run_together(llm: LLM, alone: dict[tuple[int, bool], list[int]]) -> None:
    """Each might need the whole context."""
    scheduler, chats = scheduler_of(llm), [made(PROMPTS[at], at=float(at)) for at in (0, 2, 5)]
    scheduler.submit(chats)
    step(scheduler)
    assert scheduler._running == chats
    assert finish(scheduler, *chats) == [alone[0, False], alone[2, False], alone[5, False]]


def test_the_latest_gives_way_and_goes_on_from_its_values(llm: LLM, alone: dict[tuple[int, bool], list[int]]) -> None:
    """Sampled with a seed. While others wait, the first keeps running."""
    scheduler = scheduler_of(llm)
    one, two = made(PROMPTS[0], replace(SEEDED, max_new_tokens=40), at=0.0), made(PROMPTS[2], SEEDED, at=1.0)
    scheduler.submit([two, one])
    preempted, old = scheduler.counters.preempted, new(scheduler)
    while scheduler.counters.preempted == preempted:
        step(scheduler)
    assert scheduler._running == [one] and scheduler._waiting == [two] and two.span is None
    left, before = sum(kept.span.length for kept in scheduler._prefixes._kept), computed(scheduler)
    length = len(two.tokens)
    assert left == length - 1  # all that was computed
    assert finish(scheduler, one) == [alone[0, True][:40]]
    assert finish(scheduler, two) == [alone[2, True]] and scheduler.counters.preempted == preempted + 1
    assert new(scheduler) - old == len(one.ids) + len(two.ids)
    again = computed(scheduler) - before
    assert 1 < again < length - 10 if scheduler.cache.can_cut else again == length


def test_a_smaller_priority_goes_first(llm: LLM, alone: dict[tuple[int, bool], list[int]]) -> None:
    scheduler = scheduler_of(llm)
    low = made(PROMPTS[1], replace(LONG, priority=1), at=0.0)
    scheduler.submit([low])
    for _ in range(5):
        step(scheduler)
    soon, late = made(PROMPTS[3], at=AGING - 1), made(PROMPTS[3], at=AGING + 1)  # a unit is a time, not a wall
    scheduler.submit([late, soon])
    step(scheduler)
    assert scheduler._running == [soon] and scheduler._waiting == [low, late]
    assert finish(scheduler, soon, low, late) == [alone[3, False], alone[1, False], alone[3, False]]


def test_nobody_gives_way_in_vain(llm: LLM) -> None:
    """The one that comes does not fit even if the one of a later rank goes, since the first one stays."""
    scheduler = scheduler_of(llm)
    first, last = made(PROMPTS[1], at=0.0), made([5], replace(LONG, priority=1, max_new_tokens=8), at=1.0)
    scheduler.submit([first, last])
    step(scheduler)
    assert scheduler._running == [first, last]
    scheduler.submit([middle := made(PROMPTS[3], at=2.0)])
    step(scheduler)
    assert scheduler._running == [first, last] and scheduler._waiting == [middle]
    finish(scheduler, first, middle, last)


def test_who_comes_leaves_room_for_those_that_grow(llm: LLM) -> None:
    """34 tokens are reserved, and 4 may soon be: 22 are left."""
    scheduler, few = scheduler_of(llm), replace(LONG, max_new_tokens=8)
    first, large, small = made(PROMPTS[1], at=0.0), made([9] * 19, few, at=2.0), made([9] * 18, few, at=1.0)
    scheduler.submit([first, large])
    step(scheduler)
    assert scheduler._running == [first] and scheduler._waiting == [large]
    scheduler.submit([small])
    step(scheduler)
    assert scheduler._running == [first, small] and scheduler._waiting == [large]
    finish(scheduler, first, small, large)


def test_samples_compute_the_prompt_once(folder: Path) -> None:
    params, length = replace(SEEDED, max_new_tokens=4), len(PROMPTS[1])
    with LLM.load(folder, budget=RAM, prefill_chunk=16) as llm:
        expected = [llm.generate([PROMPTS[1]], one)[0].ids for one in replace(params, n=3).samples()]
        before = llm.stats().prompt_tokens
        assert [result.ids for result in llm.generate([PROMPTS[1]], replace(params, n=3))] == expected
        new = llm.stats().prompt_tokens - before
        assert new == (length + 2 if scheduler_of(llm).cache.can_cut else 3 * length)


@pytest.mark.parametrize("wrong", [1.0, "0", True, 101, -101])
def test_a_wrong_priority(wrong: Any) -> None:
    with pytest.raises(UsageError, match="priority: expected an integer from -100 to 100"):
        SamplingParams(priority=wrong)
