"""Conversations: only what a turn adds is computed, with the tokens of computing all; kept KV values give way; turns
are left out at the end of the context."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import make_codec
from toys import make_toy

from tierlm import LLM, Budget, CheckpointError, Conversation, PromptError, SamplingParams, UsageError
from tierlm.client import Request
from tierlm.engine.sequence import Keep, Pace, Progress
from tierlm.memory.kvcache import KvCache, Span
from tierlm.templates.template import ChatTemplate
from tierlm.text import default_params
from tierlm.tracing.traceforms import read_trace

RAM = Budget("8GiB")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def params(new: int = 8, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": new, "ignore_eos": True, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    make_toy("v3", folder, vocab_size=330, max_position_embeddings=512)
    make_codec(folder, chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM.load(folder, budget=RAM, context=400, prefill_chunk=32) as llm:
        yield llm


def computed(llm: LLM) -> int:
    """Prompt tokens computed so far."""
    return llm.stats().prefill.tokens


def ids_of(pieces: Iterator[Any]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


# --- requests with a Keep


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_tokens_are_those_of_requests_from_scratch(data: st.DataObject, llm: LLM) -> None:
    """Three conversations and plain requests by turns, in a context for about two, some dropped before their end. Each
    turn goes on from any conversation with its keep."""
    keeps, histories = [Keep() for _ in range(2)], [[5, 6, 7] for _ in range(3)]
    for _ in range(8):
        which = data.draw(st.integers(0, 2))
        ids = histories[which][: data.draw(st.integers(1, 200))]
        ids = [*ids, *data.draw(st.lists(st.integers(2, 329), min_size=1, max_size=60))]
        expected = llm.generate(ids, params(6))[0].ids
        stream = llm.stream(ids, params(6), keep=data.draw(st.sampled_from(keeps)))
        pieces = data.draw(st.integers(0, 7))
        found = [token for _, piece in zip(range(pieces), stream, strict=False) for token in piece.ids]
        stream.close()  # type: ignore[attr-defined]
        assert found == expected[: len(found)]
        histories[which] = ids + found


def test_only_what_a_prompt_adds_is_computed(llm: LLM) -> None:
    keep, prompt = Keep(), list(range(2, 102))
    answer = ids_of(llm.stream(prompt, params(), keep=keep))
    before = computed(llm)
    longer = [*prompt, *answer, 7, 8, 9]
    ids_of(llm.stream(longer, params(), keep=keep))
    assert computed(llm) - before == 4  # the last token of the answer was never fed back
    before = computed(llm)
    ids_of(llm.stream(longer, params(), keep=keep))  # the same again: the logits of its last token are needed
    assert computed(llm) - before == 1
    before = computed(llm)
    ids_of(llm.stream([*prompt[:40], 3], params(), keep=keep))  # an earlier message was changed
    assert computed(llm) - before == 1
    before = computed(llm)
    ids_of(llm.stream(longer, params(), keep=Keep()))
    assert computed(llm) - before == len(longer)


def test_logits_are_the_same_bits_where_chunks_are_cut_at_the_same_tokens(folder: Path) -> None:
    keep, prompt, more = Keep(), list(range(2, 66)), list(range(80, 110))  # the prompt is two chunks
    found: list[torch.Tensor] = []
    with LLM.load(folder, budget=RAM, context=400, prefill_chunk=32) as llm:
        ids_of(llm.stream(prompt, params(1), keep=keep))
        decoder = llm._loaded().decoder
        forward = decoder.forward

        def watched(*given: Any, **named: Any) -> torch.Tensor:
            found.append(forward(*given, **named))
            return found[-1]

        decoder.forward = watched  # type: ignore[method-assign]
        ids_of(llm.stream([*prompt, *more], params(1), keep=keep))
        ids_of(llm.stream([*prompt, *more], params(1)))
    assert len(found) == 1 + 3 and torch.equal(found[0], found[-1])


def test_kept_values_give_way_the_longest_idle_first(llm: LLM) -> None:
    first, second = Keep(), Keep()
    one, two = list(range(2, 142)), list(range(150, 290))
    for _ in range(2):  # the first time the cache is full of other tests' values
        ids_of(llm.stream(one, params(), keep=first))
        ids_of(llm.stream(two, params(), keep=second))
    llm.generate([7] * 140, params())  # 400 tokens of context less twice 147 are not enough
    before = computed(llm)
    ids_of(llm.stream([*two, 2], params(), keep=second))
    assert computed(llm) - before == 1
    before = computed(llm)
    ids_of(llm.stream([*one, 2], params(), keep=first))
    assert computed(llm) - before == len(one) + 1


def test_a_request_as_large_as_the_context_takes_all_kept_values(llm: LLM) -> None:
    keep = Keep()
    ids_of(llm.stream([5, 6], params(), keep=keep))
    assert len(llm.generate([7] * 392, params(64))[0].ids) == 9
    assert len(ids_of(llm.stream([5] * 392, params(64), keep=keep))) == 9


def test_values_go_with_their_owner(llm: LLM) -> None:
    """A dropped conversation's values give way before those of a living one that has been idle for longer."""
    living, dropped = Keep(), Keep()
    ids_of(llm.stream(list(range(2, 142)), params(), keep=living))
    ids_of(llm.stream(list(range(150, 290)), params(), keep=dropped))
    del dropped
    gc.collect()
    llm.generate(list(range(2, 202)), params())
    before = computed(llm)
    ids_of(llm.stream([*range(2, 142), 9], params(), keep=living))
    assert computed(llm) - before == 1


def test_two_live_requests_with_one_keep(llm: LLM) -> None:
    keep, prompt = Keep(), list(range(2, 80))
    expected = llm.generate(prompt, params())[0].ids
    one, two = llm.stream(prompt, params(), keep=keep), llm.stream(prompt, params(), keep=keep)
    found: tuple[list[int], list[int]] = ([], [])
    for a, b in zip(one, two, strict=True):
        found[0].extend(a.ids)
        found[1].extend(b.ids)
    assert found == (expected, expected)
    before = computed(llm)
    assert ids_of(llm.stream(prompt, params(), keep=keep)) == expected and computed(llm) - before == 1


def test_a_beginning_is_copied_from_a_request_that_runs(llm: LLM) -> None:
    keep, prompt = Keep(), list(range(2, 102))
    expected = llm.generate(prompt, params())[0].ids
    stream = llm.stream(prompt, params(), keep=keep)
    found = list(next(stream).ids)
    before, other = computed(llm), [*prompt[:50], 3]
    assert ids_of(llm.stream(other, params(), keep=keep)) == llm.generate(other, params())[0].ids
    assert computed(llm) - before == 1 + len(other)
    assert found + ids_of(stream) == expected
    before = computed(llm)
    pieces = list(llm.stream([*prompt, *expected, 7], params(), keep=keep))
    assert computed(llm) - before == 2 and {piece.cached for piece in pieces} == {len(prompt) + 7}


def test_what_another_request_is_computing_is_waited_for(llm: LLM) -> None:
    """Three of one prompt at once: the others compute its last token only."""
    prompt = list(range(2, 102))
    expected, before = llm.generate(prompt, params())[0].ids, computed(llm)
    request = Request(llm._client, SimpleQueue[Progress](), [(prompt, params())] * 3, Pace.END, keep=Keep())
    request.submit()
    found = sorted((request.next() for _ in range(3)), key=lambda progress: progress.place)
    assert [progress.ids for progress in found] == [expected] * 3
    assert [progress.cached for progress in found] == [0, 99, 99] and computed(llm) - before == 102


def test_a_traced_run_numbers_a_continued_sequence_as_one(folder: Path, tmp_path: Path) -> None:
    keep, beside, file = Keep(), Keep(), tmp_path / "trace"
    with LLM.load(folder, budget=RAM, context=400, trace=file) as llm:
        first = ids_of(llm.stream([5, 6, 7], params(2), keep=keep))
        ids_of(llm.stream([5, 6, 7], params(2), keep=beside))
        ids_of(llm.stream([5, 6, 7, first[0], 8], params(2), keep=keep))  # has to move
        ids_of(llm.stream([5, 6, 9], params(2), keep=keep))  # copies two tokens
    assert read_trace(file).sequences.tolist() == [0] * 4 + [1] * 4 + [0] * 2 + [2] * 2


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_spans_keep_their_values_when_they_move(data: st.DataObject) -> None:
    cache = KvCache([3, 2], 60, torch.float32, torch.device("cpu"), [0, 4])
    spans: list[tuple[Span, list[torch.Tensor]]] = []
    for _ in range(30):
        tokens = data.draw(st.integers(1, 30))
        at = data.draw(st.integers(-1, len(spans) - 1))
        if at < 0:
            if cache.can_reserve(tokens):
                span, values = cache.reserve(tokens), [torch.rand(tokens, width) for width in (3, 2, 4)]
                for layer, rows in enumerate(values[:2]):
                    cache.append(layer, span, rows)
                cache.append_index(1, span, values[2])
                span.length = tokens
                spans.append((span, values))
        elif data.draw(st.booleans()):
            cache.release(spans.pop(at)[0])
        elif cache.can_reserve(tokens, spans[at][0]):
            spans[at][0].length = min(spans[at][0].length, tokens)
            cache.resize(spans[at][0], tokens)
        for span, values in spans:
            for layer, rows in enumerate(values[:2]):
                assert torch.equal(cache.layer(layer)[span.start :][: span.length], rows[: span.length])
            nothing = torch.empty(0, 4)
            assert torch.equal(cache.append_index(1, span, nothing), values[2][: span.length])
        ends = sorted((span.start, span.start + span.capacity) for span, _ in spans)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))


# --- conversations


def say(talk: Conversation, text: str) -> str:
    return "".join(piece.text for piece in talk.say(text))


def test_a_conversation_is_a_chat_with_all_messages(llm: LLM) -> None:
    talk = Conversation(llm, system="be brief", params=params())
    messages: list[dict[str, str]] = [{"role": "system", "content": "be brief"}]
    length = 0
    for text in ("the quick", "brown fox", "dog"):
        messages.append({"role": "user", "content": text})
        expected = "".join(piece.text for piece in llm.chat(messages, params()))
        before = computed(llm)
        assert say(talk, text) == expected
        length, known = len(llm.codec.chat(messages)), length  # the answer's text may have other tokens than it had
        assert computed(llm) - before <= length - known + 2
        messages.append({"role": "assistant", "content": expected})
    assert [talk.system, *talk.messages] == ["be brief", *messages[1:]] and talk.left_out == 0


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(llm: LLM) -> None:
    talk = Conversation(llm, params=params(60))
    pieces = talk.say("the quick")
    text = next(pieces).text + next(pieces).text
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages == [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": text}]
    talk.say("never begun").close()  # type: ignore[attr-defined]
    assert len(talk.messages) == 2 and say(talk, "again") and len(talk.messages) == 4


def test_the_oldest_turns_are_left_out_when_the_context_is_short(llm: LLM) -> None:
    talk = Conversation(llm, system="be brief", params=params(20))
    seen: list[int] = []
    prompts: list[list[dict[str, str]]] = []
    real, codec = llm.codec.chat, llm.codec

    def watched(messages: Any, *rest: Any) -> list[int]:
        prompts.append(messages)
        return real(messages, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "chat", watched)
        for number in range(12):
            say(talk, f"{number} is what the quick brown fox jumps over")
            seen.append(talk.left_out)
            length = len(real(prompts[-1]))
            assert length + 20 <= 400 and (seen[-1] == ([0, *seen])[-2] or length <= 200)
            assert prompts[-1][0] == {"role": "system", "content": "be brief"} and prompts[-1][1]["role"] == "user"
            assert prompts[-1][1:-1] == talk.messages[talk.left_out : -2]
    assert 1 < len(set(seen)) < 6 and seen == sorted(seen)  # not at every turn, which would compute all again
    assert len(talk.messages) == 24
    talk.messages.clear()
    say(talk, "anew")
    assert talk.left_out == 0


def test_a_message_longer_than_the_context_changes_nothing(llm: LLM) -> None:
    talk = Conversation(llm, params=params())
    say(talk, "the quick")
    before = list(talk.messages)
    with pytest.raises(PromptError, match="the context 400"):
        say(talk, "zqx " * 300)
    assert talk.messages == before and talk.left_out == 0 and say(talk, "brown") and len(talk.messages) == 4


def test_templates_get_tools_and_arguments(folder: Path, llm: LLM) -> None:
    template = "{{ tools[0].name }}{{ word }}{{ messages[-1].content }}"
    tools, args = [{"name": "the"}], {"word": " quick "}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.codec, "template", ChatTemplate(folder, {"chat_template": template}))
        talk = Conversation(llm, params=params(), tools=tools, template_args=args)
        expected = llm.generate("the quick fox", params())[0].text
        assert say(talk, "fox") == expected
        chat = llm.chat([{"role": "user", "content": "fox"}], params(), tools=tools, template_args=args)
        assert "".join(piece.text for piece in chat) == expected
        with pytest.raises(UsageError, match="rejects these messages"):
            say(Conversation(llm), "fox")


# --- sampling that a model recommends


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (None, SamplingParams()),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingParams()),
        ({"do_sample": True}, SamplingParams(temperature=1.0)),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "repetition_penalty": 1.05,
                "min_p": None,
            },
            SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05),
        ),
    ],
    ids=["no file", "no sampling", "sampling", "all"],
)
def test_default_params(tmp_path: Path, stated: Any, expected: SamplingParams) -> None:
    if stated is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert default_params(tmp_path) == expected


@pytest.mark.parametrize("stated", [{"temperature": "hot"}, {"top_p": 7}, {"top_k": 0.5}], ids=str)
def test_default_params_that_are_none(tmp_path: Path, stated: Any) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, **stated}))
    with pytest.raises(CheckpointError, match=f"generation_config.json: {next(iter(stated))}: expected"):
        default_params(tmp_path)
