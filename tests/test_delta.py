"""Gated DeltaNet: the rule, states of sequences that run side by side, fail, wait and go on, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import make_toy, settings_of

from tests.test_oracle import assert_close, reference
from tierlm import LLM, Budget, CheckpointError, SamplingParams
from tierlm.attention_spec import DELTA_TOKENS, Delta
from tierlm.engine.sequence import Keep
from tierlm.errors import PromptError
from tierlm.memory.kvcache import KvCache
from tierlm.models import read_spec
from tierlm.models.decoder import Segment
from tierlm.models.delta import delta_rule, delta_step
from tierlm.models.outline import Outline, sizes_of
from tierlm.spec import STATES

RAM = Budget("8GiB")
PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module", params=["qwen3-next", "qwen35"])
def toy(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_toy(request.param, folder)


@pytest.fixture(scope="module")
def llm(toy: tuple[Path, Any]) -> Iterator[LLM]:
    with LLM.load(toy[0], budget=RAM, context=250, prefill_chunk=16) as llm:
        yield llm


def prompts(count: int) -> list[list[int]]:
    return [[(7 * i + 13 * at) % 129 + 2 for i in range(9 + 6 * at)] for at in range(count)]


def ids_of(pieces: Iterator[Any]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


def computed(llm: LLM) -> int:
    return llm.stats().prefill.tokens


# --- the rule


@pytest.mark.parametrize("tokens", [1, 2, DELTA_TOKENS - 1, DELTA_TOKENS, DELTA_TOKENS + 1, 2 * DELTA_TOKENS + 5])
def test_the_rule_in_chunks_is_the_rule_token_by_token(tokens: int) -> None:
    torch.manual_seed(1)
    queries, keys = torch.randn(2, tokens, 3, 8).div(8**0.5)
    values, state = torch.randn(tokens, 3, 5), torch.randn(3, 8, 5)
    decays, betas = -torch.rand(tokens, 3) * torch.tensor([0.01, 1.0, 30.0]), torch.rand(tokens, 3)
    inputs, one_by_one = (queries, keys, values, decays, betas), state.clone()
    found = delta_rule(*inputs, state)
    steps = [delta_step(*(x[at : at + 1] for x in inputs), one_by_one) for at in range(tokens)]
    assert torch.allclose(found, torch.cat(steps), rtol=0, atol=2e-5)
    assert torch.allclose(state, one_by_one, rtol=0, atol=2e-5)


def test_long_prompts_equal_transformers(toy: tuple[Path, Any]) -> None:
    """In steps of more than DELTA_TOKENS, that it does not divide."""
    folder, model = toy
    ids = [(7 * i) % 129 + 2 for i in range(200)]
    with LLM.load(folder, budget=RAM, prefill_chunk=DELTA_TOKENS + 26) as llm:
        assert_close(llm.logits(ids), reference(model, ids))


# --- states of sequences


def test_a_batch_of_different_lengths_equals_transformers(toy: tuple[Path, Any], llm: LLM) -> None:
    """A prefill and decode steps of three sequences at once, one of which has a single token."""
    scheduler = llm._loaded().scheduler
    given = [*prompts(2), [5]]
    spans = [scheduler.cache.reserve(len(ids) + 3) for ids in given]
    found = [scheduler.decoder.forward([Segment(*each) for each in zip(given, spans, strict=True)], prefill=True)]
    for token in (3, 4, 5):
        found.append(scheduler.decoder.forward([Segment([token], span) for span in spans], prefill=False))
    for span in spans:
        scheduler.cache.release(span)
    for at, ids in enumerate(given):
        expected = reference(toy[1], [*ids, 3, 4, 5])[len(ids) - 1 :]
        assert_close(torch.stack([each[at] for each in found]), expected)


def test_requests_side_by_side(llm: LLM) -> None:
    """More than have a state at a time: the others wait. Streams by turns."""
    given = prompts(2 * STATES)
    alone = [llm.generate(ids, PARAMS)[0].ids for ids in given]
    assert [result.ids for result in llm.generate(given[:5], PARAMS)] == alone[:5]
    streams = [llm.stream(ids, PARAMS) for ids in given]
    taken = [[piece.ids[0] for piece in pieces] for pieces in zip(*streams, strict=True)]
    assert [list(column) for column in zip(*taken, strict=True)] == alone


def test_an_abandoned_step_leaves_the_state(llm: LLM) -> None:
    """Before each layer, in prefill and in decode; also when it is run again from the start."""
    scheduler = llm._loaded().scheduler
    decoder, layers = scheduler.decoder, len(llm._loaded().catalog.spec.layers)
    ids = prompts(3)[2]
    steps = [(ids[:16], True), (ids[16:], True), ([9], False), ([10], False)]

    def run(disturbed: bool) -> list[torch.Tensor]:
        span, found = scheduler.cache.reserve(len(ids) + 2), []
        for tokens, prefill in steps:
            for last in range(layers if disturbed else 0):
                with pytest.raises(InterruptedError):
                    decoder.forward([Segment(tokens, span)], prefill=prefill, watch=_raising(last))
            found.append(decoder.forward([Segment(tokens, span)], prefill=prefill))
        scheduler.cache.release(span)
        return found

    for one, other in zip(run(disturbed=False), run(disturbed=True), strict=True):
        assert torch.equal(one, other)


def _raising(layer: int) -> Callable[[], None]:
    """A watch that raises before ``layer``."""
    calls = iter(range(layer + 1))

    def watch() -> None:
        if next(calls) == layer:
            raise InterruptedError

    return watch


def test_a_conversation_goes_on_from_its_state(llm: LLM) -> None:
    """Only if the prompt begins with all that was computed: a state cannot go back, so another prompt starts anew."""
    keep, prompt = Keep(), prompts(5)[4]
    answer = ids_of(llm.stream(prompt, PARAMS, keep=keep))
    longer = [*prompt, *answer, 7, 8, 9]
    expected = llm.generate(longer, PARAMS)[0].ids
    before = computed(llm)
    assert ids_of(llm.stream(longer, PARAMS, keep=keep)) == expected
    assert computed(llm) - before == 4  # the last token of the answer was never fed back
    before = computed(llm)
    assert ids_of(llm.stream(longer, PARAMS, keep=keep)) == expected
    assert computed(llm) - before == len(longer)
    other = [*longer[:12], 3, 4]
    assert ids_of(llm.stream(other, PARAMS, keep=keep)) == llm.generate(other, PARAMS)[0].ids


def test_kept_states_give_way(llm: LLM) -> None:
    """More conversations than states, and a dropped stream whose state stays where it stopped."""
    keeps, histories = [Keep() for _ in range(STATES + 2)], prompts(STATES + 2)
    for _ in range(2):
        for at, keep in enumerate(keeps):
            expected = llm.generate(histories[at], PARAMS)[0].ids
            stream = llm.stream(histories[at], PARAMS, keep=keep)
            found = [token for _, piece in zip(range(at), stream, strict=False) for token in piece.ids]
            stream.close()  # type: ignore[attr-defined]
            assert found == expected[: len(found)]
            histories[at] += [*found, 5, 6]


def test_a_place_for_a_state_is_taken_and_given_back() -> None:
    cache = KvCache([4, 0], 100, torch.float32, torch.device("cpu"), states=[0, 6])
    spans = [cache.reserve(1) for _ in range(STATES)]
    assert sorted(span.place for span in spans) == list(range(STATES))
    assert not cache.can_reserve(1) and cache.can_reserve(50, spans[0])
    with pytest.raises(PromptError, match=f"at most {STATES} sequences at a time"):
        cache.reserve(1)
    now, later = cache.state(1, spans[0])
    assert not now.any()
    later.fill_(3)
    spans[0].advance(1)
    assert cache.state(1, spans[0])[0].eq(3).all()
    cache.resize(spans[0], 50)
    assert cache.state(1, spans[0])[0].eq(3).all()
    cache.release(spans.pop(0))
    assert not cache.state(1, again := cache.reserve(1))[0].any() and again.place not in [s.place for s in spans]


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        (RAM, {"ram_slots": 1, "resident_trunks": 0, "predictor": "gate"}),
        (Budget("8GiB", vram="1GiB"), {"ram_slots": 20, "vram_slots": 5, "resident_trunks": 2}),
    ],
)
def test_tokens_are_the_same_at_every_budget(
    budget: Budget, options: dict[str, Any], toy: tuple[Path, Any], llm: LLM
) -> None:
    given = prompts(3)
    expected = [result.ids for result in llm.generate(given, PARAMS)]
    with LLM.load(toy[0], budget=budget, context=250, prefill_chunk=16, **options) as other:
        assert [result.ids for result in other.generate(given, PARAMS)] == expected
        assert torch.equal(other.logits(given[2]), llm.logits(given[2]))


# --- tensors, sizes and configs


def test_layers_for_multi_token_prediction_are_not_used(tmp_path: Path) -> None:
    """They have names of their own."""
    make_toy("qwen35", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "mtp.fc.weight": torch.ones(2, 2), "mtp.norm.weight": torch.ones(2)}, file)
    with LLM.load(tmp_path, budget=RAM) as llm:
        assert "2 tensors of multi-token prediction layers are not used" in llm.stats().notes


def test_the_plan_counts_two_copies_of_each_state(llm: LLM) -> None:
    plan, spec = llm.stats().plan, llm._loaded().catalog.spec
    delta = next(layer.attention for layer in spec.layers if isinstance(layer.attention, Delta))
    layers = sum(isinstance(layer.attention, Delta) for layer in spec.layers)
    one = 4 * (6 * 8 * 12 + 3 * (2 * 2 * 8 + 6 * 12))  # matrices of heads, and three inputs of the convolution
    assert delta.state_width * 4 == one and plan.ram.parts["states"] == 2 * STATES * layers * one
    held = llm._loaded().scheduler.cache._states
    assert sum(each.nbytes for each in held) == plan.ram.parts["states"]
    config = settings_of("qwen3-next", linear_key_head_dim=80)
    assert sizes_of(Outline(config, "here"), 64, 16, 4).states == 2 * STATES * 4 * 4 * (6 * 80 * 12 + 3 * (320 + 72))


def test_routers_that_look_ahead_add_one_to_the_norm(llm: LLM) -> None:
    decoder = llm._loaded().decoder
    hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    for rows in (hidden[:1], hidden):
        for key, _, norm, _ in decoder._layers:
            ranked = decoder.moe.router.rank(rows, key.layer, 4)
            assert torch.equal(ranked, decoder.moe.router.route(decoder._normed(rows, norm), key.layer)[1])


def test_stacks_of_gate_above_up(tmp_path: Path, ids: list[int]) -> None:
    """As Qwen3.5 is published: both in one matrix of an expert, all experts in one tensor."""
    make_toy("qwen35", tmp_path)
    file = tmp_path / "model.safetensors"
    with LLM.load(tmp_path, budget=RAM) as llm:
        expected = llm.logits(ids)
    tensors = load_file(file)  # transformers writes them one by one
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts."
        gates, ups, downs = (
            torch.stack([tensors.pop(f"{prefix}{expert}.{part}_proj.weight") for expert in range(16)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}gate_up_proj": torch.cat((gates, ups), 1), f"{prefix}down_proj": downs}
    save_file(tensors, file)
    with LLM.load(tmp_path, budget=RAM) as llm:
        assert torch.equal(llm.logits(ids), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_num_value_heads": 3}, "3 value heads cannot share 2 key heads"),
        ({"linear_num_key_heads": 0}, "key_heads must be at least 1"),
        ({"linear_conv_kernel_dim": 1}, "kernel must be at least 2"),
        (
            {"layer_types": ["linear_attention"]},
            "layer_types: expected linear_attention or full_attention for 5 layers",
        ),
        ({"layer_types": ["attention"] * 5}, "layer_types: expected"),
    ],
)
def test_sizes_that_no_model_has(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_spec(settings_of("qwen3-next", **changes), "here")
