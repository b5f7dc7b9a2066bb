"""KV values left for others: always those of the ids, in spans that are taken over, copied, cut and given up."""

from __future__ import annotations

import zlib
from itertools import pairwise
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tierlm import SamplingParams
from tierlm.engine.prefixes import Prefixes, common
from tierlm.engine.sequence import Keep, Sequence
from tierlm.memory.kvcache import KvCache

ROOM = 60


def values(ids: list[int]) -> Tensor:
    """A value for each token, which depends on all up to it: [T, 1]."""
    found = [zlib.crc32(bytes(ids[: at + 1])) % 2**20 for at in range(len(ids))]
    return torch.tensor(found, dtype=torch.float32).reshape(-1, 1)


def made(states: bool = False) -> Prefixes:
    return Prefixes(KvCache([1], ROOM, torch.float32, torch.device("cpu"), states=[1] if states else []))


def waiting(prompt: list[int], keep: Keep | None, new: int = 0) -> Sequence:
    sequence = Sequence(prompt, SamplingParams(), SimpleQueue(), keep=keep)
    sequence.capacity = len(prompt) + new
    return sequence


def run(prefixes: Prefixes, sequence: Sequence, tokens: int) -> None:
    """A step of ``tokens``, as the decoder does it."""
    cache, span = prefixes.cache, sequence.span
    assert span is not None
    rows = values([*sequence.prompt, *sequence.ids])[: span.length + tokens]
    cache.append(0, span, rows[span.length :])
    if not cache.can_cut:
        cache.state(0, span)[1].copy_(rows[-1])
    span.advance(tokens)


def leave(prefixes: Prefixes, prompt: list[int], keep: Keep) -> int:
    """Run a request. Returns the tokens that it did not compute."""
    sequence = waiting(prompt, keep)
    sequence.span = prefixes.reserve(sequence, [])
    assert sequence.span is not None
    known = sequence.span.length
    run(prefixes, sequence, len(prompt) - known)
    prefixes.keep(sequence)
    return known


def kept(prefixes: Prefixes) -> list[list[int]]:
    return [one.ids for one in prefixes._kept]


@pytest.mark.parametrize("states", [False, True], ids=["tokens", "states"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_values_are_those_of_the_ids(states: bool, data: st.DataObject) -> None:
    prefixes, keeps = made(states), [Keep(), Keep()]
    cache, alive = prefixes.cache, list[Sequence]()
    for _ in range(30):
        act = data.draw(st.sampled_from(["start", "start", "run", "run", "end"]))
        if act == "start":
            prompt = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=20))
            sequence = waiting(prompt, data.draw(st.sampled_from([None, *keeps])), data.draw(st.integers(0, 10)))
            known = longest(prefixes, sequence, [] if states else alive, whole=states)
            before = kept(prefixes)
            sequence.span = prefixes.reserve(sequence, alive)
            if sequence.span is None:
                assert kept(prefixes) == before  # it waits for running ones: nothing gives way in vain
            else:
                assert sequence.span.length == known
                alive.append(sequence)
        elif alive:
            sequence = alive[data.draw(st.integers(0, len(alive) - 1))]
            assert sequence.span is not None
            room = sequence.capacity - sequence.span.length
            if act == "end" or not room:
                prefixes.keep(sequence)
                alive.remove(sequence)
            else:
                tokens = data.draw(st.integers(1, room))
                while len(sequence.prompt) + len(sequence.ids) < sequence.span.length + tokens:
                    sequence.ids.append(data.draw(st.integers(1, 2)))
                run(prefixes, sequence, tokens)
        spans = [(one.span, one.ids) for one in prefixes._kept]
        spans += [(one.span, one.computed) for one in alive if one.span is not None]
        for span, ids in spans:
            assert torch.equal(cache.layer(0)[span.start :][: span.length], values(ids))
            if states and ids:
                assert torch.equal(cache.state(0, span)[0], values(ids)[-1])
        ends = sorted((span.start, span.start + span.capacity) for span, _ in spans)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends)) and len(spans) == len(cache._spans)
    for sequence in alive:
        prefixes.keep(sequence)
    assert prefixes.reserve(waiting([1] * ROOM, None), []) is not None and not kept(prefixes)


def longest(prefixes: Prefixes, sequence: Sequence, alive: list[Sequence], whole: bool) -> int:
    """The tokens that it can go on from."""
    owned = [one.ids for one in prefixes._kept if one.owner() is sequence.keep]
    owned += [one.computed for one in alive if one.keep is sequence.keep]
    found = [0]
    for ids in owned if sequence.keep is not None else []:
        alike = [at for at in range(min(len(ids), len(sequence.prompt) - 1) + 1) if ids[:at] == sequence.prompt[:at]]
        found.append(alike[-1] if not whole or alike[-1] == len(ids) else 0)
    return max(found)


def test_which_spans_give_way() -> None:
    prefixes, keep = made(), Keep()
    one, two = [1] * 5 + [2] * 15, [3] * 20
    assert leave(prefixes, one, keep) == leave(prefixes, two, keep) == 0
    three = [1] * 5 + [4] * 10
    assert leave(prefixes, three, keep) == 5 and kept(prefixes) == [one, two, three]  # a copy, since there is room
    four = [1] * 5 + [5] * 15
    assert leave(prefixes, four, keep) == 5 and kept(prefixes) == [two, three, four]  # the longest idle gave way
    again = three[:12] + [6] * 8
    assert leave(prefixes, again, keep) == 12 and kept(prefixes) == [two, four, again]  # a few tokens of three did
    assert leave(prefixes, [3] * 2 + [7] * 18, keep) == 2  # two did, but for its beginning
    assert kept(prefixes) == [four, again, [3] * 2 + [7] * 18]
    assert leave(prefixes, [*again, 8], keep) == 20 and kept(prefixes)[-1] == [*again, 8]


def test_values_are_for_those_with_the_same_keep() -> None:
    prefixes, mine, yours = made(), Keep(), Keep()
    leave(prefixes, [1] * 10, mine)
    assert leave(prefixes, [1] * 10, yours) == 0
    del mine
    leave(prefixes, [2], yours)
    assert kept(prefixes) == [[1] * 10, [2]]


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common(one: list[int], other: list[int]) -> None:
    length = common(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]
