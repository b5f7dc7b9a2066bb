"""The sampler against the logits processors of `transformers`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tierlm import SamplingParams
from tierlm.engine.sampler import Sampler, logprob_of

SEEN = [3, 3, 17, 29]
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.2},
    {"temperature": 0.9, "repetition_penalty": 1.8},
    {"temperature": 1.1, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
]


GREEDY_PENALTIES: list[dict[str, Any]] = [
    {"frequency_penalty": 0.7},
    {"presence_penalty": 1.9},
    {"frequency_penalty": -0.4, "presence_penalty": 0.9},
    {"frequency_penalty": -2.0},
    {"logit_bias": {3: 1.5, 17: -40.0}},
    {"logit_bias": {0: 100}, "presence_penalty": 2, "frequency_penalty": 2},
]


def some_logits(seed: int = 0) -> Tensor:
    return 3 * torch.randn(40, generator=torch.Generator().manual_seed(seed))


def reference(logits: Tensor, settings: dict[str, float]) -> Tensor:
    """Probabilities from `transformers`, [vocab]."""
    steps = LogitsProcessorList()
    if "repetition_penalty" in settings:
        steps.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    steps.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        steps.append(TopKLogitsWarper(int(settings["top_k"])))
    if "top_p" in settings:
        steps.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        steps.append(MinPLogitsWarper(settings["min_p"]))
    return steps(torch.tensor([SEEN]), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_from_the_distribution_of_transformers(settings: dict[str, float]) -> None:
    logits = some_logits()
    expected = reference(logits, settings)
    sampler = Sampler(SamplingParams(seed=1, **settings))  # type: ignore[arg-type]
    draws = 4000
    counts = Counter(sampler.choose(logits, SEEN, []) for _ in range(draws))
    found = torch.tensor([counts[token] / draws for token in range(40)])
    assert set(counts) <= set(expected.nonzero().flatten().tolist())
    assert (found - expected).abs().sum() / 2 < 0.05  # total variation; the noise of 4000 draws stays below 0.04


def test_zero_temperature_is_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 4.0, 3.9, -2.0])
    assert Sampler(SamplingParams()).choose(logits, [0], []) == 1
    assert Sampler(SamplingParams(repetition_penalty=1.5)).choose(logits, [], [1]) == 2
    assert Sampler(SamplingParams(repetition_penalty=3.0)).choose(torch.tensor([-1.0, -2.0]), [0], []) == 1


@pytest.mark.parametrize("settings", GREEDY_PENALTIES, ids=str)
def test_penalties_and_bias_follow_the_formula_of_openai(settings: dict[str, Any]) -> None:
    """Penalties count the generated tokens only, so one that is only in the prompt keeps its logit."""
    sampler, generated = Sampler(SamplingParams(**settings)), list[int]()
    for step in range(30):
        logits = some_logits(step // 10)
        count = Counter(generated)
        expected = [
            value
            - count[token] * settings.get("frequency_penalty", 0)
            - (count[token] > 0) * settings.get("presence_penalty", 0)
            + settings.get("logit_bias", {}).get(token, 0)
            for token, value in enumerate(logits.tolist())
        ]
        generated.append(sampler.choose(logits, [int(logits.argmax())] * 9, generated))
        assert generated[-1] == max(range(40), key=expected.__getitem__)


def test_a_strong_bias_bans_and_forces() -> None:
    draw = Sampler(SamplingParams(temperature=1.0, logit_bias={int(some_logits().argmax()): -100, 5: 100}))
    assert {draw.choose(some_logits(), [], []) for _ in range(20)} == {5}


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-46, 1e-320])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    assert Sampler(SamplingParams(temperature=temperature)).choose(some_logits(), [], []) == some_logits().argmax()


def test_logprobs_are_the_logarithm_of_the_softmax() -> None:
    logits = some_logits()
    expected = logits.double().softmax(-1).log()
    found = logprob_of(logits, 7, 5)
    assert found.id == 7
    assert found.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert list(found.top) == expected.argsort(descending=True)[:5].tolist()
    assert list(found.top.values()) == pytest.approx(expected.sort(descending=True)[0][:5].tolist(), abs=1e-5)
    assert logprob_of(logits, 7, 0).top == {}
    assert len(logprob_of(logits, 7, 99).top) == 40  # the whole vocabulary


def test_a_seed_repeats_and_another_differs() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed))
        return [sampler.choose(some_logits(i), [], []) for i in range(30)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    best = int(some_logits().argmax())
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}):
        assert Sampler(SamplingParams(temperature=5.0, **settings)).choose(some_logits(), [], []) == best  # type: ignore[arg-type]


def test_logits_are_left_as_they_are() -> None:
    logits = some_logits()
    before = logits.clone()
    penalties: dict[str, float] = {"repetition_penalty": 2.0, "presence_penalty": 1, "frequency_penalty": 1}
    params = SamplingParams(temperature=0.5, top_k=3, seed=0, logit_bias={3: 1}, **penalties)  # type: ignore[arg-type]
    Sampler(params).choose(logits, SEEN, SEEN)
    assert torch.equal(logits, before)
