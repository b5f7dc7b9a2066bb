"""Drafts by a layer of multi-token prediction: its arithmetic against `transformers`, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_speculation import params
from torch import Tensor
from toys import edit_config, make_toy

from tierlm import LLM, Budget, StorageError, UsageError
from tierlm.engine.sequence import Keep
from tierlm.engine.speculation.gate import Always
from tierlm.engine.speculation.mtp import DRAFTS, MultiTokenPrediction
from tierlm.models.decoder import Segment
from tierlm.models.mtp import PredictionLayer

RAM = Budget("8GiB")
LAYERS = 4
TIGHT: dict[str, Any] = {"ram_slots": 5, "resident_trunks": 0, "prefill_chunk": 16}
PROMPTS = [[5, 9, 23, 77, 31], [88], [(41 * i + 7) % 131 for i in range(40)]]


def make_mtp(folder: Path, strength: float) -> Any:
    """A toy of four layers and one that predicts; returns it as a `transformers` model of five. Layers add ``strength``
    of what they would, so the next token depends mostly on the present one, and the layer is often right."""
    model = make_toy("v3", folder, num_hidden_layers=LAYERS + 1)
    (file,) = folder.glob("*.safetensors")
    tensors, hidden = load_file(file), model.config.hidden_size
    with torch.no_grad():  # transformers has the experts of a layer in one parameter
        for name, tensor in (*tensors.items(), *model.named_parameters()):
            if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
                tensor.mul_(strength)
    last = f"model.layers.{LAYERS}."
    own = {
        "eh_proj.weight": torch.cat((torch.eye(hidden), 0.1 * strength * torch.randn(hidden, hidden)), dim=1),
        "enorm.weight": torch.ones(hidden) + strength * torch.randn(hidden),
        "hnorm.weight": torch.ones(hidden) + 0.1 * torch.randn(hidden),
        "shared_head.norm.weight": tensors["model.norm.weight"].clone(),
        "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        "shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    model.mtp = own
    save_file({**tensors, **{last + name: tensor for name, tensor in own.items()}}, file, {"format": "pt"})
    edit_config(folder, num_hidden_layers=LAYERS, num_nextn_predict_layers=1)
    return model


def reference(model: Any, ids: list[int]) -> Tensor:
    """The states of the layer at all tokens but the last, by `transformers`."""
    inner, own, eps = model.model, model.mtp, model.config.rms_norm_eps

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    with torch.no_grad():
        layers, inner.layers = inner.layers, inner.layers[:LAYERS]
        states = inner(torch.tensor([ids]), use_cache=False).last_hidden_state[:, :-1]
        inner.layers = layers
        embedded = norm(inner.embed_tokens(torch.tensor([ids[1:]])), own["enorm.weight"])
        joined = torch.cat((embedded, norm(states, own["hnorm.weight"])), dim=-1) @ own["eh_proj.weight"].t()
        places, count = torch.arange(len(ids) - 1)[None], len(ids) - 1
        later = torch.full((count, count), float("-inf")).triu(1)[None, None]
        angles = inner.rotary_emb(joined, places)
        found = layers[LAYERS](joined, attention_mask=later, position_ids=places, position_embeddings=angles)
        return (found[0] if isinstance(found, tuple) else found).view(count, -1)


def drafts_of(model: Any, states: Tensor) -> list[int]:
    """The token that each state of the layer drafts."""
    weight, eps = model.mtp["shared_head.norm.weight"], model.config.rms_norm_eps
    normed = weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)
    found: list[int] = (normed @ model.lm_head.weight.t()).argmax(-1).tolist()
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("mtp")
    return folder, make_mtp(folder, 0.03)


@pytest.fixture(scope="module")
def plain(toy: tuple[Path, Any]) -> Iterator[LLM]:
    with LLM.load(toy[0], budget=RAM) as llm:
        yield llm


def loaded(folder: Path, **options: Any) -> LLM:
    llm = LLM.load(folder, budget=RAM, speculation="mtp", **options)
    llm._runtime.scheduler.speculation.gate = Always()
    return llm


@pytest.mark.parametrize("options", [{}, TIGHT], ids=["resident", "tight"])
@pytest.mark.parametrize("cuts", [[30], [7, 1, 3, 9, 1, 1, 8]])
def test_the_layer_equals_transformers(cuts: list[int], options: Any, toy: tuple[Path, Any]) -> None:
    """At once, and in pieces as they come in decode; in a part of the cache that does not begin at the first token."""
    ids = [(29 * i + 3) % 131 for i in range(sum(cuts) + 1)]
    expected = reference(toy[1], ids)
    with loaded(toy[0], **options) as llm:
        runtime = llm._runtime
        span = runtime.scheduler.cache.reserve(60)
        states = torch.empty(len(ids), runtime.catalog.spec.hidden)
        runtime.decoder.forward([Segment(ids, span)], prefill=True, states=states)
        layer, found, own = layer_of(llm), [], span.ahead(-span.length)
        for cut in cuts:
            at = own.length
            found.append(layer.forward(states[at : at + cut], ids[at + 1 : at + 1 + cut], own))
        error = (torch.cat(found) - expected).abs().max()
        assert error < 1e-4 * expected.abs().max()


def layer_of(llm: LLM) -> PredictionLayer:
    make: partial[MultiTokenPrediction] = llm._runtime.scheduler.speculation.make
    return make.args[0]


@pytest.mark.parametrize("options", [{}, TIGHT], ids=["resident", "tight"])
def test_same_answers_and_the_drafts_of_the_whole_text(
    options: Any, plain: LLM, toy: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After prompts in chunks, accepted drafts and rejected ones, the first draft is what `transformers` computes from
    all of the text."""
    seen: list[tuple[list[int], list[int]]] = []
    draft = MultiTokenPrediction.draft

    def noted(self: MultiTokenPrediction, sequence: Any, count: int) -> list[int]:
        seen.append(([*sequence.prompt, *sequence.ids], draft(self, sequence, count)))
        return seen[-1][1]

    monkeypatch.setattr(MultiTokenPrediction, "draft", noted)
    with loaded(toy[0], **options) as llm:
        for prompt in PROMPTS:
            assert llm.generate([prompt], params())[0].ids == plain.generate([prompt], params())[0].ids
        found = llm.stats().drafts
        assert 0.05 < found.accepted / found.drafted < 0.98
        assert llm.generate(PROMPTS, params()) == plain.generate(PROMPTS, params())
    made = [(text, drafts[0]) for text, drafts in seen if drafts]
    assert len(made) > 30
    wrong = [text for text, first in made[:60] if drafts_of(toy[1], reference(toy[1], text))[-1] != first]
    assert not wrong


@pytest.mark.parametrize("pattern", [(0, 0, 0, 2), (0,) * 12 + (3, 0, 1), (1, 0)])
def test_a_gate_that_opens_and_shuts(pattern: tuple[int, ...], plain: LLM, toy: tuple[Path, Any]) -> None:
    """Tokens that the layer has not read are left out, and drafts go on."""
    calls = iter(range(10**6))

    class Pattern(Always):
        def choose(self, chances: Any, room: int) -> list[int]:
            return super().choose(chances, min(room, pattern[next(calls) % len(pattern)]))

    with loaded(toy[0]) as llm:
        llm._runtime.scheduler.speculation.gate = Pattern()
        for prompt in PROMPTS:
            long = params(max_new_tokens=50)
            assert llm.generate([prompt], long) == plain.generate([prompt], long)
        found = llm.stats().drafts
        assert found.drafted > 5


def test_a_layer_that_is_always_right(tmp_path: Path) -> None:
    make_mtp(tmp_path, 0.0)
    with LLM.load(tmp_path, budget=RAM) as llm:
        expected = llm.generate(PROMPTS, params(max_new_tokens=40))
    with loaded(tmp_path) as llm:
        assert llm.generate(PROMPTS, params(max_new_tokens=40)) == expected
        drafts = llm.stats().drafts
        assert drafts.accepted == drafts.drafted
    with loaded(tmp_path) as llm:
        llm.generate(PROMPTS[:1], params(max_new_tokens=41))
        assert llm.stats().drafts.tokens_per_step == 1 + DRAFTS


def test_turns_that_take_up_a_prefix(plain: LLM, toy: tuple[Path, Any]) -> None:
    with loaded(toy[0], context=120) as llm:
        keep, turn = Keep(), PROMPTS[0]
        for _ in range(3):
            ids = [token for piece in llm.stream(turn, params(), keep=keep) for token in piece.ids]
            assert ids == plain.generate([turn], params())[0].ids
            turn = [*turn, *ids, 12]
        assert llm.stats().drafts.accepted > 0


def test_reads_that_fail_cost_drafts_only(plain: LLM, toy: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = PredictionLayer.forward, iter(range(10**6))

    def failing(self: PredictionLayer, *given: Any) -> Tensor:
        if next(calls) % 3 == 1:
            raise StorageError("the layer's expert")
        return forward(self, *given)

    monkeypatch.setattr(PredictionLayer, "forward", failing)
    with loaded(toy[0], prefill_chunk=16) as llm:
        for prompt in PROMPTS:
            assert llm.generate([prompt], params()) == plain.generate([prompt], params())
        assert llm.stats().drafts.accepted > 0


def test_it_is_refused_without_the_layer_and_with_a_trace(
    toy: tuple[Path, Any], originals: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("v3", "qwen3"):
        with pytest.raises(UsageError, match="speculation: mtp needs a layer"):
            LLM.load(originals(name), budget=RAM, speculation="mtp")
    with pytest.raises(UsageError, match="trace: expected None"):
        LLM.load(toy[0], budget=RAM, speculation="mtp", trace=tmp_path / "trace.npz")
