"""Greedy output and logits are the same, bit for bit, at every budget, policy, predictor and reader."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tierlm import LLM, Budget, SamplingParams
from tierlm.models.packing import pack_model
from tierlm.policies import POLICIES
from tierlm.policies.predictors import PREDICTORS

PARAMS = SamplingParams(max_new_tokens=20, ignore_eos=True)
RAM = Budget("8GiB")
BOTH = Budget("8GiB", vram="1GiB")
# The budget is tested through the slots and trunks that follow from it, since toys are small.
LEVELS: dict[str, tuple[Budget, dict[str, Any]]] = {
    "everything fits": (RAM, {}),
    "one slot, no trunk": (RAM, {"ram_slots": 1, "resident_trunks": 0}),
    "a few slots, one trunk": (RAM, {"ram_slots": 9, "resident_trunks": 1}),
    "vram, everything fits": (BOTH, {}),
    "one slot in each tier, no trunk": (BOTH, {"ram_slots": 1, "vram_slots": 1, "resident_trunks": 0}),
    "three tiers, tight": (BOTH, {"ram_slots": 20, "vram_slots": 5, "resident_trunks": 2}),
}


@pytest.fixture(scope="module", params=["v3", "qwen3"])
def toy(request: Any, toy_v3: tuple[Path, Any], toy_qwen3: tuple[Path, Any]) -> tuple[Path, Any]:
    """A toy of each kind of attention; the grouped one has a dense layer between MoE layers."""
    return toy_v3 if request.param == "v3" else toy_qwen3


@pytest.fixture(scope="module")
def expected(toy: tuple[Path, Any], ids: list[int] = [11, 7, 90, 45, 3, 3, 62]) -> tuple[list[int], list[int]]:  # noqa: B006
    """The prompt, and its continuation by `transformers`."""
    out = toy[1].generate(
        torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return ids, out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def logits(toy: tuple[Path, Any], expected: tuple[list[int], list[int]]) -> Tensor:
    """Of prompt and continuation, with everything in memory."""
    with LLM.load(toy[0], budget=RAM) as llm:
        return llm.logits(expected[0] + expected[1])


# Every predictor with every reader, and every policy with one pair.
CASES = [("default", *case) for case in product(PREDICTORS, ["direct", "mmap"])]
CASES += [(policy, "gate", "direct") for policy in POLICIES]


@pytest.mark.parametrize(("policy", "predictor", "reader"), CASES)
@pytest.mark.parametrize("level", LEVELS)
def test_same_tokens(
    level: str,
    policy: str,
    predictor: str,
    reader: str,
    toy: tuple[Path, Any],
    expected: tuple[list[int], list[int]],
    logits: Tensor,
) -> None:
    budget, limits = LEVELS[level]
    prompt, tokens = expected
    with LLM.load(toy[0], budget=budget, policy=policy, predictor=predictor, reader=reader, **limits) as llm:
        assert llm.generate([prompt], PARAMS)[0].ids == tokens
        assert llm.generate([prompt], PARAMS)[0].ids == tokens  # warm
        assert torch.equal(llm.logits(prompt + tokens), logits)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_same_logits_bit_for_bit(threads: int, toy: tuple[Path, Any], ids: list[int]) -> None:
    """The order in which experts arrive does not affect the arithmetic."""
    with LLM.load(toy[0], budget=RAM) as llm:
        first = llm.logits(ids)
        assert torch.equal(llm.logits(ids), first)
    tight = {"ram_slots": 5, "resident_trunks": 1, "transfer_threads": threads}
    with LLM.load(toy[0], budget=RAM, **tight) as llm:
        assert torch.equal(llm.logits(ids), first)
        assert torch.equal(llm.logits(ids), first)


def test_more_prompts_than_fit_at_once(toy: tuple[Path, Any]) -> None:
    """Several prompts of different lengths, more than the context holds at once, give the same as alone."""
    prompts = [[5, 9, 23], [88], [7] * 30, [64, 2, 111, 12, 40], [3, 3]]
    with LLM.load(toy[0], budget=RAM, context=60) as llm:
        together = [result.ids for result in llm.generate(prompts, PARAMS)]
        assert together == [llm.generate([prompt], PARAMS)[0].ids for prompt in prompts]
        assert all(len(ids) == 20 for ids in together)


PACKED = {
    "lossless": ("keep", "keep", "none"),
    "compressed": ("keep", "keep", "zstd"),
    "fp8": ("fp8", "fp8", "none"),
    "int8": ("int8", "int8", "none"),
    "int4, trunk int8": ("int4", "int8", "none"),
}


@pytest.mark.parametrize("formats", PACKED)
def test_same_logits_of_a_packed_store(formats: str, toy: tuple[Path, Any], ids: list[int], tmp_path: Path) -> None:
    """Within one format: at every budget, reader and number of threads."""
    experts, trunk, codec = PACKED[formats]
    pack_model(toy[0], tmp_path / "packed", experts=experts, trunk=trunk, codec=codec)
    with LLM.load(tmp_path / "packed", budget=RAM) as llm:
        expected = llm.logits(ids)
        tokens = llm.generate([ids[:7]], PARAMS)[0].ids
    with LLM.load(toy[0], budget=RAM) as llm:
        error = (llm.logits(ids) - expected).norm() / expected.norm()
    assert error < (1e-6 if experts == "keep" else 0.3)
    for level, reader, threads in (
        ("one slot, no trunk", "direct", 1),
        ("a few slots, one trunk", "mmap", 3),
        ("one slot in each tier, no trunk", "direct", 4),
        ("three tiers, tight", "direct", 16),
    ):
        budget, limits = LEVELS[level]
        options = {**limits, "reader": reader, "transfer_threads": threads}
        with LLM.load(tmp_path / "packed", budget=budget, **options) as llm:
            assert torch.equal(llm.logits(ids), expected)
            assert llm.generate([ids[:7]], PARAMS)[0].ids == tokens
