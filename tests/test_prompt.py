"""What is taken for a prompt, and what is refused."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest
import torch

from tierlm import PromptError
from tierlm.prompt import ids_of, several

IDS = [5, 6, 7]
ONE: list[Any] = [
    IDS,
    (5, 6, 7),
    range(5, 8),
    array.array("q", IDS),
    np.array(IDS),
    np.array(IDS, dtype=np.uint16),
    np.array([[0, 5], [0, 6], [0, 7]])[:, 1],
    torch.tensor(IDS),
    torch.tensor(IDS, dtype=torch.int32),
    [np.int64(5), torch.tensor(6), 7],
]


@pytest.mark.parametrize("prompt", ONE, ids=lambda prompt: f"{type(prompt).__name__}-{prompt}")
def test_ids_may_be_in_any_sequence_or_array(prompt: Any) -> None:
    assert ids_of(prompt) == IDS
    assert all(type(token) is int for token in ids_of(prompt))
    assert len(several(prompt)) == 1
    assert [ids_of(one) for one in several([prompt, prompt])] == [IDS, IDS]  # type: ignore[arg-type]


def test_several_prompts() -> None:
    assert several("text") == ["text"]
    assert several(["text", IDS]) == ["text", IDS]
    assert several(()) == several([]) == []
    batch = np.array([IDS, IDS])
    assert [ids_of(row) for row in several(list(batch))] == [IDS, IDS]  # type: ignore[arg-type]
    short = [torch.tensor([5]), torch.tensor([6, 7])]
    assert [ids_of(row) for row in several(short)] == [[5], [6, 7]]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([IDS]), "expected one dimension, found 2; for several prompts give a list of 1-D arrays"),
        (torch.tensor(5), "expected one dimension, found 0"),
        (np.array([5.0]), r"expected integers, found 5\.0 at 0"),
        ([5, 6.5], r"expected integers, found 6\.5 at 1"),
        ([5, True], "expected integers, found True at 1"),
        (torch.tensor([True]), "expected integers, found True at 0"),
        ([5, "6"], "expected integers, found '6' at 1"),
        ([[5], [6]], r"expected integers, found \[5\] at 0"),
        (b"text", "expected text, or token ids .* found bytes"),
        ({5, 6}, "expected text, or token ids .* found set"),
        (5, "expected text, or token ids .* found int"),
        (None, "expected text, or token ids .* found NoneType"),
    ],
    ids=repr,
)
def test_anything_else_is_an_error(prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        ids_of(prompt)
