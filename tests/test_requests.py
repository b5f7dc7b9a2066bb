"""What a request may ask for: ids in arrays, parameters per prompt, samples, log probabilities, penalties."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_llm import faulty, is_expert

import tierlm.demo
import tierlm.progress
from tierlm import LLM, Budget, PromptError, SamplingParams, TokenLogprob, UsageError
from tierlm.answer import Answer
from tierlm.checkpoints.reader import Request as Read
from tierlm.engine.sequence import Progress
from tierlm.progress import prefill_bar
from tierlm.text import TextCodec, TextStream

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def llm(toy_v3: tuple[Path, Any]) -> Iterator[LLM]:
    with LLM.load(toy_v3[0], budget="8GiB") as llm:
        yield llm


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 8, "ignore_eos": True, **changes})


def test_a_budget_may_be_a_size(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=4 << 30) as llm:
        assert llm._runtime.ram_budget == Budget("4GiB").ram
    for wrong in ("8 GiBs", "", -1, True):
        with pytest.raises(UsageError, match="budget ram: expected"):
            LLM.load(toy_v3[0], budget=wrong)


def test_a_model_says_what_it_is(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget="4GiB", context=100) as llm:
        assert repr(llm) == f"<LLM {toy_v3[0]}, 4 layers on cpu, ram 4.00 GiB, context 100>"
    assert repr(llm) == f"<LLM {toy_v3[0]}, closed>"


def test_ids_in_arrays(llm: LLM) -> None:
    expected = llm.generate([PROMPT], params())[0].ids
    for prompt in (np.array(PROMPT), torch.tensor(PROMPT)):
        assert [result.ids for result in llm.generate(prompt, params())] == [expected]
        assert llm.generate([prompt, PROMPT], params())[0].prompt_ids == PROMPT
        assert [token for piece in llm.stream(prompt, params()) for token in piece.ids] == expected
        assert torch.equal(llm.logits(prompt), llm.logits(PROMPT))
    with pytest.raises(PromptError, match="expected one dimension, found 2; for several prompts give a list"):
        llm.generate(np.array([PROMPT, PROMPT]))
    with pytest.raises(PromptError, match=r"expected integers, found 5\.5 at 0"):
        llm.generate([[5.5, 6]])  # type: ignore[list-item]


def test_parameters_per_prompt(llm: LLM) -> None:
    each = [params(max_new_tokens=3), params(temperature=5.0, seed=4)]
    together = llm.generate([PROMPT, [9]], each)
    alone = [llm.generate([PROMPT], each[0])[0], llm.generate([[9]], each[1])[0]]
    assert [result.ids for result in together] == [result.ids for result in alone]
    assert llm.generate(PROMPT, each[:1])[0].ids == alone[0].ids
    with pytest.raises(UsageError, match="expected one for each of 3 prompts, found 2"):
        llm.generate([PROMPT] * 3, each)
    for wrong in ({"temperature": 1.0}, [None, None], 0.5):
        with pytest.raises(UsageError, match="params: expected SamplingParams, or one for each prompt, found"):
            llm.generate([PROMPT, PROMPT], wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="params: expected SamplingParams"):
        next(llm.stream(PROMPT, {"temperature": 1.0}))  # type: ignore[arg-type]


def test_samples_follow_their_prompt_and_have_seeds_one_after_another(llm: LLM) -> None:
    found = llm.generate([PROMPT, [9]], params(temperature=5.0, seed=3, n=3))
    assert [result.prompt_ids for result in found] == [PROMPT] * 3 + [[9]] * 3
    alone = [llm.generate([PROMPT], params(temperature=5.0, seed=seed))[0].ids for seed in (3, 4, 5)]
    assert [result.ids for result in found[:3]] == alone
    assert len({tuple(ids) for ids in alone}) == 3
    mixed = llm.generate([PROMPT, [9]], [params(n=2), params()])
    assert [result.prompt_ids for result in mixed] == [PROMPT, PROMPT, [9]]
    unseeded = llm.generate(PROMPT, params(temperature=5.0, n=2))
    assert unseeded[0].ids != unseeded[1].ids
    with pytest.raises(UsageError, match="n: a stream has one sample, found 2"):
        next(llm.stream(PROMPT, params(n=2)))


def test_logprobs_are_those_of_the_models_own_logits(llm: LLM) -> None:
    asked = params(logprobs=4, temperature=3.0, seed=1, presence_penalty=2.0, logit_bias={50: 9.0})
    result = llm.generate([PROMPT], asked)[0]
    assert result.logprobs is not None
    expected = llm.logits(PROMPT + result.ids)[len(PROMPT) - 1 : -1].double().log_softmax(-1)
    for row, token, found in zip(expected, result.ids, result.logprobs, strict=True):
        assert found.id == token
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert list(found.top.values()) == pytest.approx(row.topk(4)[0].tolist(), abs=1e-4)
    pieces = list(llm.stream(PROMPT, asked))
    assert [one for piece in pieces for one in piece.logprobs or ()] == result.logprobs
    assert all(len(piece.logprobs or ()) == len(piece.ids) for piece in pieces)


def test_logprobs_only_where_asked_for(llm: LLM) -> None:
    asked, not_asked = llm.generate([PROMPT, PROMPT], [params(logprobs=0), params()])
    assert asked.ids == not_asked.ids
    assert asked.logprobs is not None and [one.top for one in asked.logprobs] == [{}] * 8
    assert not_asked.logprobs is None
    assert next(llm.stream(PROMPT, params())).logprobs is None


def test_logprobs_end_with_the_text() -> None:
    """At a stop text, though more tokens were computed."""
    codec = TextCodec(Path(tierlm.demo.__file__).parent)
    ids = codec.encode("The Congress will stop here, and then go on.")
    answer = Answer([5], TextStream(codec, ["stop"]))
    answer.add(Progress(0, ids, "length", None, [TokenLogprob(token, -1.0, {}) for token in ids]))
    result = answer.result()
    assert result.text == "The Congress will " and result.finish_reason == "stop"
    assert 0 < len(result.ids) < len(ids)
    assert result.logprobs is not None and [one.id for one in result.logprobs] == result.ids


def test_penalties_and_bias_act(llm: LLM) -> None:
    plain = llm.generate([PROMPT], params())[0].ids
    assert plain[0] not in llm.generate([PROMPT], params(logit_bias={plain[0]: -100}))[0].ids
    assert llm.generate([PROMPT], params(logit_bias={11: 100}))[0].ids == [11] * 8
    among = {"logit_bias": dict.fromkeys((11, 12, 13, 14), 100), "frequency_penalty": 2.0}
    assert {*llm.generate([PROMPT], params(**among))[0].ids} == {11, 12, 13, 14}
    with pytest.raises(UsageError, match="logit_bias: token id 131 is not in the vocabulary of 131"):
        llm.generate([PROMPT], params(logit_bias={3: 1, 131: 1}))


def test_prefill_is_told_layer_by_layer(toy_v3: tuple[Path, Any]) -> None:
    """The disk waits in the last layer of the first of three chunks until the caller has been told."""
    told: list[tuple[int, int]] = []
    gate = threading.Event()

    def listen(done: int, total: int) -> None:
        told.append((done, total))
        if 0 < done < 16:
            gate.set()

    def wait(request: Read, buffer: memoryview) -> bool:
        if is_expert(request, "layers.3.mlp.experts."):
            gate.wait(10)
            gate.set()
        return False

    prompt = [(7 * i) % 120 + 2 for i in range(40)]
    with faulty(toy_v3[0], prefill_chunk=16, predictor="none", heat=False) as (llm, reader):
        expected = llm.generate([prompt], params())[0].ids
        reader.fault = wait
        assert [token for piece in llm.stream(prompt, params(), on_prefill=listen) for token in piece.ids] == expected
        assert any(0 < done < 16 for done, _ in told)
        assert told[0] == (0, 40) and told[-1] == (40, 40) and told.count((40, 40)) == 1
        assert told == sorted(told)
        both: list[tuple[int, int]] = []
        llm.generate([prompt, [9]], params(), on_prefill=lambda *counts: both.append(counts))
        assert both[0] == (0, 41) and both[-1] == (41, 41)
        assert llm.generate([], on_prefill=lambda *counts: both.append(counts)) == []


def test_an_error_of_the_listener_ends_the_request_and_nothing_else(llm: LLM) -> None:
    def fail(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.generate([PROMPT], params(), on_prefill=fail)
    with pytest.raises(ZeroDivisionError):
        next(llm.stream(PROMPT, params(), on_prefill=fail))
    assert len(llm.generate([PROMPT], params())[0].ids) == 8


def test_a_bar_shows_tokens_and_bytes_and_goes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(tierlm.progress, "Console", lambda stderr: terminal)
    with prefill_bar(llm) as bar:
        bar(0, 7)
        bar(3, 7)
        bar(7, 7)
        before = screen.getvalue()
        bar(7, 7)
        assert screen.getvalue() == before
    assert re.search(r"7/7 tokens, [\d.]+ \w+ read", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", before))
    with prefill_bar(llm, quiet=True) as bar:
        bar(3, 7)
    assert screen.getvalue() == before
