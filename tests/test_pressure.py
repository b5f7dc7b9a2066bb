"""--ram auto under memory pressure. The pressure is simulated: no test takes the machine's memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tierlm import LLM, Budget, SamplingParams
from tierlm.memory import pressure as module
from tierlm.memory.pressure import INTERVAL, Pressure, Reading, read_pressure

RESERVE = 1000


def after(reading: Reading, held: int = 8000) -> int:
    """The decision of a first look."""
    clock: Iterator[float] = iter([0.0, INTERVAL])
    return Pressure(RESERVE, lambda: reading, lambda: next(clock)).change(held)


@pytest.mark.parametrize(
    ("available", "stalled", "change"),
    [
        (1000, 0.0, 0),  # as planned
        (600, 0.0, 0),  # a little less changes nothing
        (400, 0.0, -600),  # up to the reserve
        (0, 0.0, -1000),
        (1400, 0.0, 0),
        (1600, 0.0, 600),
        (1000, 0.5, -1000),  # tasks wait for memory although some is free: an eighth
        (600, 0.5, -1000),
        (5000, 0.5, 0),  # nothing is taken back while tasks wait
    ],
)
def test_what_is_given_back_and_taken(available: int, stalled: float, change: int) -> None:
    assert after(Reading(available, stalled)) == change


def test_looks_are_not_more_frequent_than_needed() -> None:
    times, looks = [0.0], []

    def look() -> Reading:
        looks.append(times[-1])
        return Reading(0, 0.0)

    follower = Pressure(RESERVE, look, lambda: times[-1])
    for step in range(1, 21):
        times.append(step * INTERVAL / 4)
        follower.change(8000)
    assert len(looks) == 5


def test_readings_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_pressure()
    assert found.available > 0 and 0 <= found.stalled <= 1
    (tmp_path / "psi").write_text("some avg10=12.50 avg60=1.00 avg300=0.10 total=9\nfull avg10=1.0 total=1\n")
    assert module._stalled(tmp_path / "psi") == 0.125
    (tmp_path / "psi").write_text("nonsense")
    assert module._stalled(tmp_path / "psi") == 0.0
    assert module._stalled(tmp_path / "absent") == 0.0


class Machine:
    """A machine with a given amount of free memory."""

    def __init__(self) -> None:
        self.available = RESERVE
        self.now = 0.0

    def read(self) -> Reading:
        return Reading(self.available, 0.0)

    def clock(self) -> float:
        self.now += INTERVAL
        return self.now


def test_slots_are_given_up_and_taken_back_and_the_tokens_stay_the_same(toy_v3: tuple[Path, Any]) -> None:
    folder, _ = toy_v3
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    with LLM.load(folder, budget=Budget("2GiB"), context=256, heat=False) as llm:
        expected = llm.generate([[5, 6, 7]], params)[0].ids
        assert llm._runtime.relief is None, "a budget that was named is kept"
    machine = Machine()
    with LLM.load(folder, budget=Budget("auto"), context=256, heat=False) as llm:
        runtime = llm._runtime
        tier, whole = runtime.experts[-1], len(runtime.experts[-1].slots)
        assert runtime.relief is not None
        llm.generate([[5, 6, 7]], params)
        size = tier.slots[0].size
        filled = sum(slot.filled for slot in tier.slots)
        runtime.relief.pressure = Pressure(RESERVE * size, machine.read, machine.clock)
        machine.available = 0
        assert llm.generate([[5, 6, 7]], params)[0].ids == expected
        least = runtime.catalog.spec.experts_per_token
        assert len(tier.slots) == least and tier.retired == whole - least
        assert len(tier.entries) <= least
        assert runtime.relief.shrunk >= (filled - least) * (size - 2 * 4096) > 0
        assert any("short of memory" in note for note in llm.stats().notes)
        machine.available = 2 * RESERVE * size
        assert llm.generate([[5, 6, 7]], params)[0].ids == expected
        assert len(tier.slots) == whole and tier.retired == 0
        assert llm.generate([[5, 6, 7]], params)[0].ids == expected


def test_a_model_that_waits_for_requests_gives_memory_back(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=Budget("auto"), context=256, heat=False) as llm:
        relief, tier, machine = llm._runtime.relief, llm._runtime.experts[-1], Machine()
        assert relief is not None
        machine.available = 0
        relief.pressure = Pressure(RESERVE * tier.slots[0].size, machine.read, machine.clock)
        deadline = time.monotonic() + 20
        while not tier.retired:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=4, ignore_eos=True))[0].ids) == 4


def test_memory_goes_back_to_the_system() -> None:
    import torch

    from tierlm.host import process_ram
    from tierlm.memory.slots import Slot, allocate

    size = 64 * 2**20
    slab = allocate(size, torch.device("cpu"))
    slot = Slot(slab)
    assert slot.decommit() == 0, "nothing was written: there is nothing to decommit"
    slab.fill_(7)
    slot.filled = True
    before = process_ram()
    assert slot.decommit() == size
    assert process_ram() < before - size // 2
    slab.fill_(9)
    assert int(slab[12345]) == 9
