"""Many requests alive at once, from one thread or several: each gets what it gets alone, in any order of events."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_llm import faulty, is_expert

from tierlm import LLM, Budget, PromptError, SamplingParams, StorageError, UsageError
from tierlm.checkpoints.reader import Request, failure
from tierlm.engine.sequence import Pace, Sequence
from tierlm.memory.kvcache import KvCache, Span

RAM = Budget("8GiB")
PROMPTS = [[5, 9, 23], [88], [7] * 30, [64, 2, 111, 12, 40], [3, 3], [100, 1 + 1, 50] * 4, [17], [90, 91, 92, 93]]
LENGTH = 8


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": LENGTH, "ignore_eos": True, **changes})


@pytest.fixture(scope="module")
def alone(toy_v3: tuple[Path, Any]) -> list[list[int]]:
    """What each prompt gives alone."""
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        return [llm.generate([prompt], params())[0].ids for prompt in PROMPTS]


def ids_of(pieces: Iterator[Any]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


@pytest.mark.parametrize("slots", [None, 5])
@pytest.mark.parametrize("count", [2, 8])
def test_streams_by_turns(count: int, slots: int | None, toy_v3: tuple[Path, Any], alone: list[list[int]]) -> None:
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=slots) as llm:
        streams = [llm.stream(prompt, params()) for prompt in PROMPTS[:count]]
        found: list[list[int]] = [[] for _ in streams]
        for _ in range(LENGTH):
            for stream, ids in zip(streams, found, strict=True):
                ids += next(stream).ids
        assert found == alone[:count]


def test_generate_and_logits_during_a_stream(toy_v3: tuple[Path, Any], alone: list[list[int]]) -> None:
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=5) as llm:
        logits = llm.logits(PROMPTS[2])
        stream = llm.stream(PROMPTS[0], params())
        first = next(stream).ids
        assert torch.equal(llm.logits(PROMPTS[2]), logits)
        assert llm.generate([PROMPTS[1]], params())[0].ids == alone[1]
        assert first + ids_of(stream) == alone[0]


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streams_started_and_dropped_at_random(
    data: st.DataObject, crowded: LLM, toy_v3: tuple[Path, Any], alone: list[list[int]]
) -> None:
    """In a context for about three of them, so that some wait for room."""
    live: dict[int, tuple[int, Iterator[Any], list[int]]] = {}
    for step in range(40):
        act = data.draw(st.sampled_from(["start", "next", "next", "next", "drop", "logits"]))
        if act == "start" and len(live) < 8:
            which = data.draw(st.integers(0, len(PROMPTS) - 1))
            live[step] = which, crowded.stream(PROMPTS[which], params()), []
        elif act == "logits":
            crowded.logits(PROMPTS[3])
        elif live and act != "start":
            name = data.draw(st.sampled_from(sorted(live)))
            which, stream, ids = live[name]
            piece = next(stream, None) if act == "next" else None
            if piece is not None:
                ids += piece.ids
                assert ids == alone[which][: len(ids)]
            else:
                assert act == "drop" or ids == alone[which]
                stream.close()  # type: ignore[attr-defined]
                del live[name]
    for which, stream, ids in live.values():
        assert ids + ids_of(stream) == alone[which]
    scheduler = crowded._runtime.scheduler
    crowded.logits([3])
    assert not scheduler._waiting and not scheduler._running
    assert scheduler.cache.can_reserve(scheduler.cache.capacity)
    assert all(entry.pins == 0 for entry in crowded._runtime.experts[0].entries.values())


@pytest.fixture(scope="module")
def crowded(toy_v3: tuple[Path, Any]) -> Iterator[LLM]:
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=9, context=60, prefill_chunk=16) as llm:
        yield llm


@pytest.mark.parametrize("slots", [None, 16])
def test_threads(slots: int | None, toy_v3: tuple[Path, Any], alone: list[list[int]]) -> None:
    """Eight threads; each generates, streams, and abandons a stream."""

    def work(which: int) -> None:
        for _ in range(3):
            assert llm.generate([PROMPTS[which]], params())[0].ids == alone[which]
            left = llm.stream(PROMPTS[which], params())
            assert next(left).ids[0] == alone[which][0]  # or more, if others waited for room
            assert ids_of(llm.stream(PROMPTS[which], params())) == alone[which]
            left.close()  # type: ignore[attr-defined]

    with LLM.load(toy_v3[0], budget=RAM, ram_slots=slots, context=100) as llm, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, which) for which in range(len(PROMPTS))]:
            done.result()


def test_a_stream_that_nobody_reads_runs_one_token_ahead_at_most(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        stream = llm.stream(PROMPTS[0], params(max_new_tokens=100))
        next(stream)
        llm.generate([PROMPTS[1]], params(max_new_tokens=50))
        (sequence,) = llm._runtime.scheduler._running
        assert len(sequence.ids) == 2


def test_a_request_that_waits_for_room_does_not_wait_for_its_reader(
    toy_v3: tuple[Path, Any], alone: list[list[int]]
) -> None:
    """The stream reserves nearly the whole context and is not consumed: it runs to its end, and loses nothing."""
    with LLM.load(toy_v3[0], budget=RAM, context=30) as llm:
        stream = llm.stream(PROMPTS[0], params(max_new_tokens=25))
        ids = next(stream).ids
        assert llm.generate([PROMPTS[3]], params())[0].ids == alone[3]
        ids += ids_of(stream)
        assert len(ids) == 25 and ids[:LENGTH] == alone[0]


def test_prompts_share_the_chunks_of_a_prefill(toy_v3: tuple[Path, Any]) -> None:
    prompts = [[(11 * i + 7 * j) % 129 + 2 for i in range(6)] for j in range(16)]
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=4, predictor="none", heat=False) as llm:
        llm.generate(prompts, params(max_new_tokens=1))
        assert llm.stats().experts["ram"].misses <= 3 * 16  # each record of three layers once
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=4, prefill_chunk=20) as llm:
        together = [result.ids for result in llm.generate(prompts, params())]
        assert together == [llm.generate([prompt], params())[0].ids for prompt in prompts]


def test_prompts_and_answers_of_others_share_the_time(
    toy_v3: tuple[Path, Any], alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefill step takes 3 s and a decode step 1 s, in the time that the scheduler sees."""
    now, steps = 0.0, ""
    with LLM.load(toy_v3[0], budget=RAM, prefill_chunk=16) as llm:
        runtime = llm._loaded()
        forward = runtime.decoder.forward

        def timed(*given: Any, prefill: bool, **named: Any) -> Any:
            nonlocal now, steps
            now, steps = now + (3 if prefill else 1), steps + ("p" if prefill else "d")
            return forward(*given, prefill=prefill, **named)

        monkeypatch.setattr(runtime.decoder, "forward", timed)
        monkeypatch.setattr("tierlm.engine.scheduler.time", SimpleNamespace(perf_counter=lambda: now))

        def run(box: SimpleQueue[Any], other: SimpleQueue[Any]) -> tuple[list[int], str]:
            """A long prompt that comes while a short one is answered: the short one's answer, and the steps."""
            nonlocal steps
            steps = ""
            short = Sequence(PROMPTS[0], params(max_new_tokens=30), box, pace=Pace.END)
            long = Sequence([7] * 80, params(max_new_tokens=1), other, pace=Pace.END)
            runtime.scheduler.submit([short])
            runtime.scheduler.step(lambda batch: None)
            runtime.scheduler.submit([long])
            while not (short.ended and long.ended):
                runtime.scheduler.step(lambda batch: None)
            return short.ids, steps

        ids, found = run(SimpleQueue(), SimpleQueue())
        assert ids[:LENGTH] == alone[0] and found == "p" + "pddd" * 5 + "d" * 14
        box = SimpleQueue[Any]()
        assert run(box, box) == (ids, "p" + "p" * 5 + "d" * 29)  # one request ends when both have ended


def test_a_failure_is_its_own(toy_v3: tuple[Path, Any], alone: list[list[int]]) -> None:
    """An expert of some sequences cannot be read, in prefill or in decode: the others are not affected."""
    with faulty(toy_v3[0]) as (llm, reader):

        def fail(request: Request, buffer: memoryview) -> bool:
            if is_expert(request, "layers.2.mlp.experts.3."):
                raise failure(request, request.start, "input/output error")
            return False

        reader.fault = fail
        failed = 0
        streams = [llm.stream(prompt, params()) for prompt in PROMPTS]
        for stream, expected in zip(streams, alone, strict=True):
            try:
                assert ids_of(stream) == expected
            except StorageError:
                failed += 1
        assert 0 < failed < len(PROMPTS)
        reader.fault = lambda request, buffer: False
        assert [result.ids for result in llm.generate(PROMPTS, params())] == alone


def test_a_wrong_prompt_leaves_no_request_behind(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        with pytest.raises(PromptError):
            llm.generate([[5, 6], [999]], params())
        assert not llm._runtime.scheduler._waiting


def test_closing_while_others_run(toy_v3: tuple[Path, Any]) -> None:
    llm = LLM.load(toy_v3[0], budget=RAM)
    stream, begun = llm.stream(PROMPTS[0], params(max_new_tokens=200)), threading.Event()

    def read() -> None:
        for _ in stream:
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        begun.wait(10)
        llm.close()
        with pytest.raises(UsageError, match="closed"):
            reading.result()
    with pytest.raises(UsageError, match="closed"):
        llm.logits([1])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 40)), max_size=60))
def test_spans_never_overlap(acts: list[tuple[bool, int, int]]) -> None:
    cache = KvCache([4], 100, torch.float32, torch.device("cpu"))
    held: list[Span] = []
    for take, which, tokens in acts:
        if take and cache.can_reserve(tokens):
            held.append(cache.reserve(tokens))
        elif take:
            with pytest.raises(PromptError, match=rf"{tokens} tokens do not fit the context: \d+ of 100 are free"):
                cache.reserve(tokens)
        elif held:
            cache.release(held.pop(which % len(held)))
        places = sorted((span.start, span.start + span.capacity) for span in held)
        assert all(a[1] <= b[0] for a, b in pairwise(places))
        assert all(0 <= start < stop <= 100 for start, stop in places)
    for span in held:
        cache.release(span)
    assert cache.can_reserve(100)
