"""JSON by grammar: what is drawn from any logits is JSON after the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tierlm.demo
from tierlm import LLM, SamplingParams, UsageError
from tierlm.engine.sampler import Sampler
from tierlm.server.call_stream import CallStream
from tierlm.server.grammar import Grammars
from tierlm.server.tool_calls import FORMS, Call
from tierlm.text import TextCodec

pytest.importorskip("llguidance", reason="needs the server: pip install tierlm[serve]")

VOCAB, EOS = 3072, 1
OBJECT = {"type": "object"}
HERMES, LLAMA = (form for form in FORMS if form.arguments is not None)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}, "sex": {"enum": ["f", "m"]}},
    "required": ["name", "age", "sex"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(Path(tierlm.demo.__path__[0]))


@pytest.fixture(scope="module")
def grammars(codec: TextCodec) -> Grammars:
    return Grammars(codec, VOCAB, [EOS])


def test_random_logits_give_json_after_the_schema(codec: TextCodec, grammars: Grammars) -> None:
    """Two answers with one constraint: each has its own state."""
    params = SamplingParams(temperature=1.0, seed=1, constraint=grammars.json(SCHEMA))
    random = torch.Generator().manual_seed(0)
    for _ in range(2):
        sampler, ids = Sampler(params), list[int]()
        while not ids or ids[-1] != EOS:
            ids.append(sampler.choose(torch.randn(VOCAB, generator=random), [], ids))
            assert len(ids) < 300
        found = json.loads(codec.decode(ids[:-1]))
        assert set(found) == {"name", "age", "sex"} and isinstance(found["age"], int)
        assert found["sex"] in ("f", "m") and len(found["name"]) <= 9


@pytest.mark.parametrize("name", ["qwen", "qwen with a special token", "llama"])
def test_random_logits_give_one_call(codec: TextCodec, grammars: Grammars, name: str) -> None:
    form = {"qwen": HERMES, "llama": LLAMA}.get(name, replace(HERMES, open="<|user|>", close="<|assistant|>"))
    functions = {"f": {**SCHEMA, "required": ["age"]}, "g": {"additionalProperties": False}}
    params = SamplingParams(temperature=1.0, seed=1, constraint=grammars.call(form, functions))
    random, found = torch.Generator().manual_seed(0), set[str]()
    for _ in range(8):
        sampler, ids = Sampler(params), list[int]()
        while not ids or ids[-1] != EOS:
            ids.append(sampler.choose(torch.randn(VOCAB, generator=random), [], ids))
            assert len(ids) < 300
        stream = CallStream(form, functions)
        (call,) = [*stream.feed(codec.decode(ids[:-1], special=True)), *stream.end(True)]
        assert isinstance(call, Call) and ("age" in call.arguments) == (call.name == "f")
        found.add(call.name)
    assert found == {"f", "g"}


def test_the_answer_ends_only_where_the_json_does(codec: TextCodec, grammars: Grammars) -> None:
    constraint = grammars.json(OBJECT)()
    ids = codec.encode('{"a": [1, 2]}', special=False)
    for at in range(len(ids)):
        mask = constraint.mask(ids[:at])
        assert mask is not None and mask[ids[at]] and not mask[EOS]
    assert constraint.mask(ids).nonzero().flatten().tolist() == [EOS]  # type: ignore[union-attr]


def test_white_space_ends(codec: TextCodec, grammars: Grammars) -> None:
    (newline,) = codec.encode("\n", special=False)
    constraint, ids = grammars.json(OBJECT)(), codec.encode("{", special=False)
    while constraint.mask(ids)[newline]:  # type: ignore[index]
        ids.append(newline)
        assert len(ids) < 100


def test_errors(codec: TextCodec, grammars: Grammars) -> None:
    with pytest.raises(UsageError, match="the schema is not supported: Invalid type: strange"):
        grammars.json({"type": "strange"})
    with pytest.raises(UsageError, match="the schema is not valid JSON"):
        grammars.json({"minimum": float("nan")})
    constraint = grammars.json(OBJECT)()
    with pytest.raises(UsageError, match="the answer cannot go on"):
        constraint.mask(codec.encode("no JSON", special=False))


def test_without_the_library(codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"pip install 'tierlm\[serve\]'"):
        Grammars(codec, VOCAB, [EOS])


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM.load("demo", budget="2GiB", context=400) as loaded:
        yield loaded


def test_a_model_answers_in_json_and_beside_others(llm: LLM, grammars: Grammars) -> None:
    plain = SamplingParams(max_new_tokens=20)
    (alone,) = llm.generate("The Congress", plain)
    free, found = llm.generate(
        ["The Congress"] * 2, [plain, SamplingParams(max_new_tokens=200, constraint=grammars.json(SCHEMA))]
    )
    assert free.ids == alone.ids
    assert found.finish_reason == "stop" and found.text is not None
    assert set(json.loads(found.text)) == {"name", "age", "sex"}
