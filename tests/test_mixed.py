"""Preemption, stored prefixes and speculation at once: each request gets the tokens that it gets alone."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_preemption import CONTEXT, LONG, PROMPTS, RAM, SEEDED, check, finish, made, step

from tierlm import LLM
from tierlm.engine import scheduler, stored
from tierlm.engine.sequence import Keep, Pace, Progress, Sequence
from tierlm.engine.speculation.gate import Always
from tierlm.memory import kvblock, kvdisk
from tierlm.memory.kvfiles import BlockFiles
from tierlm.memory.kvmover import Move, Mover

TOKENS, BUFFERS, SLOTS = 4, 6, 12  # of a block; blocks on their way; blocks on disk


class ByHand(Mover):
    """FAKE: a disk that moves a block when it is told to, or when the engine has nothing else to do."""

    def __init__(self, *arguments: Any):
        self.held = list[Move]()
        super().__init__(*arguments)

    def submit(self, move: Move) -> None:
        self.held.append(move)

    def go(self) -> None:
        """Move the next block."""
        if self.held:
            move = next((move for move in self.held if not move.writes), self.held[0])
            self.held.remove(move)
            super().submit(move)
            super().wait(move, 60)
            assert move.done

    def wait(self, move: Move, timeout: float) -> None:
        self.go()

    def close(self, timeout: float) -> bool:
        while self.held:
            self.go()
        return super().close(timeout)


@dataclass
class Client:
    """Some samples of one prompt, and what was read of each."""

    samples: list[Sequence]
    expected: list[int]
    found: list[list[int]] = field(default_factory=list)

    def read(self, llm: LLM) -> None:
        """Take what is there, and ask for more."""
        mailbox: Any = self.samples[0].mailbox
        while not mailbox.empty():
            progress = mailbox.get()
            assert progress.error is None
            self.found[progress.place] += progress.ids
        scheduler_of(llm).ask(self.samples)


def scheduler_of(llm: LLM) -> scheduler.Scheduler:
    return llm._loaded().scheduler


def mover_of(llm: LLM) -> ByHand:
    disk = llm._loaded().kv_disk
    assert disk is not None and isinstance(disk._mover, ByHand)
    return disk._mover


@pytest.fixture(scope="module")
def alone(originals: Callable[[str], Path]) -> dict[tuple[int, bool], list[int]]:
    """What each prompt gives alone, by its number and whether it is sampled."""
    with LLM.load(originals("v3"), budget=RAM, context=CONTEXT, prefill_chunk=16) as llm:
        return {
            (at, sampled): llm.generate([PROMPTS[at]], SEEDED if sampled else LONG)[0].ids
            for at, sampled in itertools.product(range(len(PROMPTS)), (False, True))
        }


class Broken:
    """FAKE: reads of blocks that fail while ``now``."""

    now = False


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    broken, real = Broken(), BlockFiles.read

    def read(files: BlockFiles, slot: int, block: memoryview) -> None:
        if broken.now:
            raise OSError("made up")
        real(files, slot, block)

    monkeypatch.setattr(BlockFiles, "read", read)
    return broken


@pytest.fixture
def llm(
    originals: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Broken
) -> Iterator[LLM]:
    """Its thread sleeps, since it gets no request: the test runs its scheduler. Little room everywhere."""
    monkeypatch.setattr(scheduler, "ROOM", 4)
    monkeypatch.setattr(kvblock, "MIN_TOKENS", TOKENS)
    monkeypatch.setattr(kvblock, "MAX_TOKENS", TOKENS)
    monkeypatch.setattr(kvdisk, "MIN_BUFFERS", BUFFERS)
    monkeypatch.setattr(kvdisk, "MAX_BUFFERS", BUFFERS)
    monkeypatch.setattr(kvdisk, "Mover", ByHand)
    monkeypatch.setattr(stored, "loading_pays", lambda *_: True)
    options: Any = {"kv_disk": SLOTS * 4096, "kv_folder": tmp_path, "speculation": "lookup"}
    with LLM.load(originals("v3"), budget=RAM, context=CONTEXT, prefill_chunk=16, **options) as llm:
        speculation = scheduler_of(llm).speculation
        assert speculation is not None
        speculation.gate = Always()
        yield llm


def test_any_schedule(llm: LLM, alone: dict[tuple[int, bool], list[int]], broken: Broken) -> None:
    """Priorities, samples, readers that pause, cancels, and disks that are slow or fail, at random. Nothing is left."""
    disk, own = llm._loaded().kv_disk, scheduler_of(llm)
    assert disk is not None

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(data=st.data())
    def any_schedule(data: st.DataObject) -> None:
        try:
            run_any(data, llm, alone, broken)
        finally:
            own.cancel([*own._running, *own._waiting])
        while mover_of(llm).held:
            mover_of(llm).go()
        disk.collect()
        assert not own._stored._loads and not own._stored._chains and not own._running and not own._waiting
        assert len(disk._buffers) == BUFFERS and not disk._unwanted
        assert not any(entry.pins or entry.writing for entry in disk._entries.values())
        gc.collect()  # the values that are kept go with their owner, whom hypothesis may hold in a cycle
        own.submit([last := made([3], replace(LONG, max_new_tokens=1))])  # what nobody owns leaves
        finish(own, last)
        assert own.cache.free == CONTEXT

    any_schedule()
    assert own.counters.preempted and own.counters.drafts.accepted and disk.tier.hit_tokens and disk.tier.evicted


def run_any(data: st.DataObject, llm: LLM, alone: dict[tuple[int, bool], list[int]], broken: Broken) -> None:
    own, clients, broken.now = scheduler_of(llm), list[Client](), False
    keeps = [Keep(), Keep(), Keep(stored=False), None]  # not drawn themselves: a strategy holds what it draws from
    acts = ["start", "start", "start", "step", "step", "steps", "steps", "read"]
    acts += ["disk", "disk", "cancel", "stall", "break"]
    for second in range(data.draw(st.integers(1, 40))):
        act = data.draw(st.sampled_from(acts))
        if act == "start":
            at, sampled = data.draw(st.integers(0, len(PROMPTS) - 1)), data.draw(st.booleans())
            new, priority = data.draw(st.integers(1, CONTEXT)), data.draw(st.integers(-1, 1))
            params = replace(SEEDED if sampled else LONG, max_new_tokens=new, priority=priority)
            keep, pace = keeps[data.draw(st.integers(0, 3))], data.draw(st.sampled_from(list(Pace)))
            count, mailbox = data.draw(st.integers(1, 3)), SimpleQueue[Progress]()
            samples = [
                Sequence(PROMPTS[at], params, mailbox, place, pace, keep=keep, submitted=float(second))
                for place in range(count)
            ]
            own.submit(samples)
            clients.append(Client(samples, alone[at, sampled][:new], [[] for _ in samples]))
        elif act in ("step", "steps"):
            for _ in range(1 if act == "step" else 10):
                if own.wanted:
                    step(own)
                    check(own)
        elif act == "disk":
            mover_of(llm).go()
        elif act == "stall":
            for load in own._stored._loads.values():
                load.since -= 1e6
        elif act == "break":
            broken.now = not broken.now
        elif clients:
            at = data.draw(st.integers(0, len(clients) - 1))
            if act == "read":
                clients[at].read(llm)
            else:
                own.cancel(clients.pop(at).samples)
                check(own)
    for _ in range(2000):
        for client in clients:
            client.read(llm)
        mover_of(llm).go()
        if all(sequence.ended for client in clients for sequence in client.samples):
            break
        step(own)
        check(own)
    for client in clients:
        assert all(sequence.ended and sequence.finish == "length" for sequence in client.samples), "no progress"
        assert client.found == [client.expected] * len(client.samples)
