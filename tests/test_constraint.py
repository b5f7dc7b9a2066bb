"""Constraints: what decides which tokens a sequence may have next."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tierlm import LLM, SamplingParams, UsageError
from tierlm.engine.sampler import Sampler


class Only:
    """Allows two tokens, and after three of them anything."""

    def mask(self, ids: Sequence[int], /) -> Tensor | None:
        return None if len(ids) >= 3 else torch.isin(torch.arange(40), torch.tensor([4, 9]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen(temperature: float) -> None:
    logits = torch.arange(40.0)
    sampler = Sampler(SamplingParams(temperature=temperature, constraint=Only, logit_bias={0: 100, 4: 5, 9: 2}))
    drawn = {sampler.choose(logits, [], [4] * count) for count in range(3) for _ in range(40)}
    assert drawn == ({9} if temperature == 0 else {4, 9})
    assert sampler.choose(logits, [], [4] * 3) == 0


def test_a_constraint_that_fails_ends_its_answer_only() -> None:
    class Broken:
        def mask(self, ids: Sequence[int], /) -> None:
            if len(ids) == 3:
                raise UsageError("no more")

    plain = SamplingParams(max_new_tokens=9)
    with LLM.load("demo", budget="2GiB", context=100) as llm:
        broken, free = llm.generate(["The Congress"] * 2, [SamplingParams(max_new_tokens=9, constraint=Broken), plain])
        assert broken.finish_reason == "error" and isinstance(broken.error, UsageError) and len(broken.ids) == 3
        assert free.finish_reason == "length" and broken.ids == free.ids[:3]
        with pytest.raises(UsageError, match="no more"):
            list(llm.stream("The Congress", SamplingParams(constraint=Broken)))
        assert len(llm.generate("The Congress", plain)[0].ids) == 9


def test_a_constraint_is_a_callable() -> None:
    with pytest.raises(UsageError, match="constraint: expected a callable"):
        SamplingParams(constraint=5)  # type: ignore[arg-type]
