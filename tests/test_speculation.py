"""Speculative decoding: tokens, samples and logits are those without drafts, whatever is drafted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tierlm import LLM, Budget, SamplingParams, StorageError, UsageError
from tierlm.config import RuntimeOptions
from tierlm.engine.sequence import Keep, Pace, Sequence
from tierlm.engine.speculation.gate import Always, Measured
from tierlm.engine.speculation.lookup import PromptLookup
from tierlm.engine.speculation.speculation import ROWS, Speculation
from tierlm.models.decoder import Decoder, Segment
from tierlm.models.packing import pack_model
from tierlm.tracing.traceforms import read_trace

RAM = Budget("8GiB")
PROMPTS = [[5, 9, 23, 5, 9, 23, 5, 9], [88], [64, 2, 111, 12, 40]]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 24, "ignore_eos": True, **changes})


@dataclass
class Scripted:
    """Drafts what it knows of the answers, and every ``wrong``th token wrongly."""

    known: dict[tuple[int, ...], list[int]]
    wrong: int
    free: bool = True

    def observe(self, sequence: Sequence, states: Tensor) -> None:
        pass

    def kinds(self, sequence: Sequence, most: int) -> list[int]:
        return list(range(most))

    def draft(self, sequence: Sequence, count: int) -> list[int]:
        answer = self.known.get(tuple(sequence.prompt), [])
        at = range(len(sequence.ids), len(sequence.ids) + count)
        right = [answer[place] if place < len(answer) else 7 for place in at]
        return [token if place % self.wrong else (token + 1) % 131 for token, place in zip(right, at, strict=True)]


def drafting(llm: LLM, make: Callable[[], Any]) -> LLM:
    """``llm``, which verifies all that is drafted."""
    llm._runtime.scheduler.speculation = Speculation(make, Always())
    return llm


def scripted(llm: LLM, answers: list[list[int]], wrong: int) -> LLM:
    known = {tuple(prompt): ids for prompt, ids in zip(PROMPTS, answers, strict=True)}
    return drafting(llm, lambda: Scripted(known, wrong))


@pytest.fixture(scope="module", params=["v3", "qwen3"])
def toy(request: Any, toy_v3: tuple[Path, Any], toy_qwen3: tuple[Path, Any]) -> Path:
    return (toy_v3 if request.param == "v3" else toy_qwen3)[0]


@pytest.fixture(scope="module")
def plain(toy: Path) -> Iterator[LLM]:
    with LLM.load(toy, budget=RAM) as llm:
        yield llm


@pytest.fixture(scope="module")
def drafted(toy: Path) -> Iterator[LLM]:
    with LLM.load(toy, budget=RAM, ram_slots=20, resident_trunks=1, speculation="lookup") as llm:
        yield llm


@pytest.fixture(scope="module")
def answers(plain: LLM) -> list[list[int]]:
    return [plain.generate([prompt], params())[0].ids for prompt in PROMPTS]


@pytest.mark.parametrize("format", ["keep", "fp8", "int8", "int4"])
def test_the_rows_of_drafts_have_the_bits_of_single_tokens(format: str, toy: Path, tmp_path: Path) -> None:
    pack_model(toy, tmp_path / "packed", experts=format, trunk=format if format != "int4" else "int8")
    ids = [11, 7, 90, 45, 3, 3, 62, 8, 9, 14, 77, 12, 100, 1, 2]
    with LLM.load(tmp_path / "packed", budget=RAM) as llm:
        decoder, cache = llm._runtime.decoder, llm._runtime.scheduler.cache
        span, other = cache.reserve(40), cache.reserve(40)
        decoder.forward([Segment(ids[:7], span), Segment(ids[3:9], other)], prefill=True)
        expected = torch.cat([decoder.forward([Segment([token], span)], prefill=False) for token in ids[7:]])
        for rows in range(2, ROWS):
            span.retract(span.length - 7)
            steps = [Segment([5], other), Segment(ids[7 : 7 + rows], span)]
            assert torch.equal(decoder.forward(steps, prefill=False)[1:], expected[:rows])
            other.retract(1)


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 5},
    "filtered": {"temperature": 1.5, "seed": 6, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "bias": {"logit_bias": {3: 4.0, 9: -100.0}, "temperature": 0.7, "seed": 1},
    "logprobs": {"logprobs": 3},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
}


@pytest.mark.parametrize("wrong", [1, 3, 1000])
@pytest.mark.parametrize("case", CASES)
def test_same_answers(case: str, wrong: int, plain: LLM, drafted: LLM, answers: list[list[int]]) -> None:
    """Whether all drafts are wrong, some or none; alone and beside others."""
    expected = [plain.generate([prompt], params(**CASES[case]))[0] for prompt in PROMPTS]
    llm = scripted(drafted, [result.ids for result in expected], wrong)
    assert [llm.generate([prompt], params(**CASES[case]))[0] for prompt in PROMPTS] == expected
    assert llm.generate(PROMPTS, params(**CASES[case])) == plain.generate(PROMPTS, params(**CASES[case]))


def test_right_drafts_are_accepted_and_counted(toy: Path, answers: list[list[int]]) -> None:
    with LLM.load(toy, budget=RAM, speculation="lookup") as llm:
        scripted(llm, answers, 1000).generate([PROMPTS[1]], params())
        drafts = llm.stats().drafts
        assert (drafts.drafted, drafts.accepted, drafts.turns) == (20, 20, 3)  # 1 + 8 + 8 + 7 tokens
        assert llm.stats().decode.tokens == 23
        assert drafts.tokens_per_step == pytest.approx(23 / 3)


def test_samples_have_the_distribution_without_drafts(plain: LLM, drafted: LLM, answers: list[list[int]]) -> None:
    """Each of many seeds gives the same tokens, so every distribution over them is the same. Drafts are the likeliest
    tokens, which are right now and then."""
    llm = scripted(drafted, answers, 1000)
    before = llm.stats().drafts
    for seed in range(40):
        hot = params(temperature=0.6, seed=seed, max_new_tokens=6)
        assert llm.generate([PROMPTS[0]], hot) == plain.generate([PROMPTS[0]], hot)
    after = llm.stats().drafts
    assert 0 < after.accepted - before.accepted < after.drafted - before.drafted


def test_stop_ids_and_constraints_end_within_the_drafts(plain: LLM, drafted: LLM, answers: list[list[int]]) -> None:
    class Odd:
        def mask(self, ids: Any) -> Tensor:
            return torch.arange(131) % 2 == 1

    llm = scripted(drafted, answers, 1000)
    for changes in ({"stop_ids": [answers[0][4]]}, {"constraint": Odd}):
        assert llm.generate(PROMPTS, params(**changes)) == plain.generate(PROMPTS, params(**changes))


def test_a_stream_yields_token_by_token(plain: LLM, drafted: LLM, answers: list[list[int]]) -> None:
    llm = scripted(drafted, answers, 5)
    pieces = list(llm.stream(PROMPTS[0], params(logprobs=2)))
    assert pieces == list(plain.stream(PROMPTS[0], params(logprobs=2)))
    assert [len(piece.ids) for piece in pieces] == [1] * 24


def test_rejected_drafts_are_not_kept(plain: LLM, drafted: LLM, answers: list[list[int]]) -> None:
    """What a sequence leaves for the next turn holds its own tokens only."""
    llm, keep = scripted(drafted, answers, 2), Keep()
    first = [token for piece in llm.stream(PROMPTS[0], params(), keep=keep) for token in piece.ids]
    turn = [*PROMPTS[0], *first, 17, 4]
    *_, last = llm.stream(turn, params(max_new_tokens=1, logprobs=5), keep=keep)
    assert last.cached == len(PROMPTS[0]) + len(first) - 1
    assert last.ids == plain.generate([turn], params(max_new_tokens=1))[0].ids


def test_a_draft_that_cannot_be_computed_costs_nothing(
    drafted: LLM, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose experts cannot be read."""
    forward = Decoder.forward

    def failing(self: Decoder, steps: Any, **options: Any) -> Tensor:
        if not options["prefill"] and any(len(step.ids) > 1 for step in steps):
            raise StorageError("a draft's expert")
        return forward(self, steps, **options)

    monkeypatch.setattr(Decoder, "forward", failing)
    llm = scripted(drafted, answers, 1000)
    assert [result.ids for result in llm.generate(PROMPTS, params())] == answers


def test_a_trace_holds_the_rows_of_drafts(toy: Path, answers: list[list[int]], tmp_path: Path) -> None:
    """Rejected ones too, since their experts were demanded."""
    with LLM.load(toy, budget=RAM, speculation="lookup", trace=tmp_path / "trace.npz") as llm:
        assert [result.ids for result in scripted(llm, answers, 5).generate(PROMPTS, params())] == answers
        drafts = llm.stats().drafts
    trace = read_trace(tmp_path / "trace.npz")
    assert (~trace.prefill).sum() == drafts.turns + drafts.drafted
    assert (trace.experts >= 0).all()


def test_states_and_unknown_names_are_refused(originals: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="speculation: expected off for qwen3_next"):
        LLM.load(originals("qwen3-next"), budget=RAM, speculation="lookup")
    with pytest.raises(UsageError, match="speculation: expected off"):
        RuntimeOptions(speculation="always")


def test_a_full_step_has_no_drafts(plain: LLM, drafted: LLM) -> None:
    """More rows take other kernels: the logits could differ in their last bits."""
    rows: list[int] = []
    decoder = drafting(drafted, lambda: Scripted({}, 3))._runtime.decoder
    forward = decoder.forward

    def watched(steps: Any, **options: Any) -> Tensor:
        rows.append(sum(len(step.ids) for step in steps))
        return forward(steps, **options)

    decoder.forward = watched  # type: ignore[method-assign]
    try:
        for count in (1, 3, 7, 8, 9):
            rows.clear()
            drafted.generate([[40 + at] for at in range(count)], params(max_new_tokens=6))
            assert max(rows[1:]) <= max(ROWS, count)
    finally:
        del decoder.forward


def sequence_of(prompt: list[int], ids: list[int]) -> Sequence:
    made = Sequence(prompt, SamplingParams(), mailbox=None, pace=Pace.END)  # type: ignore[arg-type]
    made.ids = ids
    return made


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_lookup_finds_the_latest_place_of_the_last_tokens(prompt: list[int], ids: list[int]) -> None:
    """Step by step, as a search through all of the text finds it, and how much of the text before is the same there."""
    lookup, sequence = PromptLookup(), sequence_of(prompt, [])
    for count in range(1, len(ids) + 1):
        sequence.ids = ids[:count]
        text = prompt + sequence.ids
        places = [
            end
            for length in (4, 2)
            for end in range(len(text) - 1, length - 1, -1)
            if length < len(text) and text[end - length : end] == text[-length:]
        ]
        kinds = lookup.kinds(sequence, 5)
        assert bool(kinds) == bool(places)
        if places:
            most = range(min(16, places[0]), 0, -1)
            same = next(count for count in most if text[places[0] - count : places[0]] == text[-count:])
            assert kinds == [min(same + at, 16).bit_length() for at in range(5)]
            expected = list(text)
            for at in range(5):
                expected.append(expected[places[0] + at])
            assert lookup.draft(sequence, 5) == expected[len(text) :]


def simulate(row: float, right: float, steps: int = 2000, noise: float = 0.0) -> tuple[float, float]:
    """Tokens a second with the gate, over those without; and the share of steps with drafts. Steps take a second, each
    draft ``row`` more, and is right with a probability of ``right``."""
    gate, luck = Measured(), random.Random(3)
    seconds, tokens, used = 0.0, 0, 0
    for _ in range(steps):
        (drafts,) = gate.choose([[right] * 7], 7)
        found = 1
        while found <= drafts and luck.random() < right:
            found += 1
        took = (1.0 + row * drafts) * math.exp(noise * luck.gauss(0, 1))
        gate.add(1, drafts, found, took)
        seconds, tokens, used = seconds + took, tokens + found, used + bool(drafts)
    return tokens / seconds / math.exp(-(noise**2) / 2), used / steps


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("row", [0.05, 0.3, 0.6, 0.9, 1.5])
@pytest.mark.parametrize("right", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_the_gate_never_loses_more_than_its_allowance(right: float, row: float, noise: float) -> None:
    """In a model of time. And it gains where there is something to gain."""
    speed, used = simulate(row, right, noise=noise)
    assert speed > 0.97
    if right >= max(0.6, 1.5 * row):
        assert speed > 1.0 + (right - row) / 4
        assert used > 0.8


def test_the_gate_believes_what_it_measures_not_what_is_promised() -> None:
    """Drafts said to be right are not: the debt stops them."""
    gate, seconds, tokens = Measured(), 0.0, 0
    for _ in range(3000):
        (drafts,) = gate.choose([[1.0] * 7], 7)
        gate.add(1, drafts, 1, 1.0 + 0.5 * drafts)
        seconds, tokens = seconds + 1.0 + 0.5 * drafts, tokens + 1
    assert tokens / seconds > 0.97


def test_always_shares_the_room() -> None:
    assert Always().choose([[1.0] * 7, [], [0.1]], 5) == [4, 0, 1]


def test_what_is_drafted_is_judged_before_it_is_verified() -> None:
    """Lookup costs nothing, so a gate that is shut learns how often its drafts would be right."""
    speculation = Speculation(PromptLookup, Measured())
    sequence = sequence_of([1, 2, 3, 4] * 3, [1])
    sequence.limit, sequence.span = 100, type("Span", (), {"capacity": 1000, "length": 13})()
    for _ in range(12):
        proposals = speculation.propose([sequence])
        sequence.ids.append(sequence.ids[-1] % 4 + 1)
        speculation.learn([sequence], proposals, 1.0 + 0.1 * len(proposals[0].verified))
        assert len(proposals[0].verified) <= 1 + 7 * (len(sequence.ids) > 4)
    assert all(average.value == 1.0 for average in sequence.chances.values() if average.count)
