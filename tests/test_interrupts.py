"""A KeyboardInterrupt at any instruction of a client: the call ends, and the model answers the next one as before."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import pytest
import torch
from test_loading import open_files

from tierlm import LLM, Budget, SamplingParams, answer, client
from tierlm import llm as api
from tierlm.config import RuntimeOptions
from tierlm.worker import Worker

RAM = Budget("8GiB")
PARAMS = SamplingParams(max_new_tokens=4, ignore_eos=True)
PROMPTS = [[5, 9, 23], [88], [64, 2, 111, 12, 40]]
STEPS = int(os.environ.get("TIERLM_INTERRUPTS", "60"))  # places to interrupt, per test
CLIENT_FILES = {api.__file__, answer.__file__, client.__file__}


class Interrupt:
    """Raises KeyboardInterrupt at the ``at``-th instruction of client code in this thread; counts those before it."""

    def __init__(self, at: int | None = None):
        self.at, self.count = at, 0

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in CLIENT_FILES:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._trace


def places(count: int) -> list[int]:
    """``STEPS`` of the first ``count`` instructions, or all."""
    return sorted({1 + place * count // STEPS for place in range(STEPS)}) if count > STEPS else [*range(1, count + 1)]


def check_whole(llm: LLM) -> None:
    """Nothing of an earlier request is left."""
    runtime: Any = llm._runtime
    llm.logits([3])  # behind the messages of what was interrupted
    scheduler = runtime.scheduler
    assert not scheduler._waiting and not scheduler._running
    assert scheduler.cache.can_reserve(scheduler.cache.capacity)
    for tier in (*runtime.experts, *runtime.trunk_tiers):
        tier.settle()
        tier.check_integrity()
        assert all(entry.pins == 0 for entry in runtime.experts[0].entries.values())


def generate(llm: LLM) -> Any:
    return [result.ids for result in llm.generate(PROMPTS, PARAMS)]


def stream(llm: LLM) -> Any:
    return [piece.ids for piece in llm.stream(PROMPTS[0], PARAMS)]


def two_streams(llm: LLM) -> Any:
    return list(zip(*[(piece.ids for piece in llm.stream(prompt, PARAMS)) for prompt in PROMPTS[:2]], strict=True))


def logits(llm: LLM) -> Any:
    return llm.logits(PROMPTS[2]).tolist()


CALLS = [generate, stream, two_streams, logits]


@pytest.fixture(scope="module")
def toy(toy_v3: tuple[Path, Any]) -> Iterator[LLM]:
    with LLM.load(toy_v3[0], budget=RAM, ram_slots=8, context=40) as llm:
        yield llm


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_an_interrupt_at_any_instruction(call: Callable[[LLM], Any], toy: LLM) -> None:
    expected = call(toy)
    with Interrupt() as counted:
        call(toy)
    assert counted.count > 100
    for at in places(counted.count):
        with pytest.raises(KeyboardInterrupt) as kept, Interrupt(at):  # a notebook keeps the traceback, and its frames
            call(toy)
        assert call(toy) == expected, f"after an interrupt at instruction {at}"
        assert not toy._runtime.scheduler._running, f"after an interrupt at instruction {at}"  # type: ignore[union-attr]
        del kept
    check_whole(toy)


def test_an_interrupted_load_leaves_nothing_open(toy_v3: tuple[Path, Any]) -> None:
    def load() -> LLM:
        return LLM.load(toy_v3[0], budget=RAM, progress=lambda done, total: None)

    before, files = set(threading.enumerate()), open_files()
    with Interrupt() as counted:
        load().close()
    for at in places(counted.count)[:: max(1, STEPS // 12)]:
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            load().close()
    for thread in set(threading.enumerate()) - before:
        if isinstance(thread, Worker):
            thread.join(60)
    assert set(threading.enumerate()) <= before and open_files() <= files
    with load() as llm:
        assert len(generate(llm)) == len(PROMPTS)


def test_a_load_whose_thread_is_listed_but_does_not_run_yet_is_not_waited_for(
    toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt within ``Thread.start`` leaves one, for a moment."""
    begun, listed = Worker(toy_v3[0], RAM, RuntimeOptions(), SimpleQueue()), threading.enumerate
    begun.leaving = True
    monkeypatch.setattr(threading, "enumerate", lambda: [*listed(), begun])
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        assert len(generate(llm)) == len(PROMPTS)


def test_a_storm_of_signals() -> None:
    """At random times, wherever Python is: in this file, in the API, in a queue."""
    calls: list[Callable[[LLM], Any]] = [
        lambda llm: llm.generate("The President", PARAMS),
        lambda llm: list(llm.stream("of the United States", PARAMS)),
        lambda llm: llm.logits([1, 2, 3, 4]).tolist(),
    ]
    armed, interrupted, choose = False, 0, random.Random(1)

    def interrupt(number: int, frame: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with LLM.load("demo", budget=RAM, ram_slots=8, heat=False) as llm:
            expected = [call(llm) for call in calls]
            for turn in range(4 * STEPS):
                which = turn % len(calls)
                try:
                    signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-4, 0.06))
                    armed = True
                    found = calls[which](llm)
                    armed = False
                    assert found == expected[which]
                except KeyboardInterrupt:
                    armed = False
                    interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert interrupted
            assert [call(llm) for call in calls] == expected
            check_whole(llm)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_cancelled_step_is_abandoned(toy_v3: tuple[Path, Any]) -> None:
    """Between two layers: nobody waits for the rest of an interrupted prompt, not even the next request."""
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        runtime: Any = llm._runtime
        expected, begun, go_on, layers = generate(llm), threading.Event(), threading.Event(), []
        attend = runtime.decoder._attention[0].forward

        def slow(hidden: torch.Tensor, layer: int, *others: Any) -> Any:
            layers.append(layer)
            begun.set()
            assert go_on.wait(60)
            return attend(hidden, layer, *others)

        runtime.decoder._attention[0].forward = slow
        request = client.Request(llm._client, client.SimpleQueue(), [(PROMPTS[0], PARAMS)], client.Pace.EACH)
        request.submit()
        assert begun.wait(60)
        request.cancel()
        go_on.set()
        check_whole(llm)
        assert layers == [0, 0, 1, 2, 3]  # one layer of the abandoned step, then all of the check's
        assert generate(llm) == expected
