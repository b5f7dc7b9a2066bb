"""What a prompt may be: text, or token ids in a sequence or a 1-D array."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from tierlm.errors import PromptError


@runtime_checkable
class Array(Protocol):
    """An array of numpy, a tensor of torch, or the like."""

    @property
    def ndim(self) -> int: ...

    def tolist(self) -> Any: ...


Prompt = str | Sequence[int] | Array
Prompts = str | Array | Sequence[Prompt | int]  # one or several; with one kind of sequence mypy infers ["text", [1, 2]]


def several(prompts: Prompts) -> list[Prompt]:
    """The prompts of a call that takes one or several. Integers in a sequence are the ids of one prompt."""
    if isinstance(prompts, (str, Array)) or not isinstance(prompts, Sequence):
        return [prompts]
    return [prompts] if len(prompts) > 0 and _id(prompts[0]) is not None else list(prompts)  # type: ignore[list-item, arg-type]


def ids_of(prompt: Sequence[int] | Array) -> list[int]:
    """The token ids of a prompt. Raises PromptError unless they are integers in one dimension."""
    if isinstance(prompt, Array):
        if prompt.ndim != 1:
            raise PromptError(
                f"token ids: expected one dimension, found {prompt.ndim}; for several prompts give a list of 1-D "
                "arrays without padding"
            )
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes, bytearray)):
        raise PromptError(
            f"a prompt: expected text, or token ids in a sequence or 1-D array, found {type(prompt).__name__}"
        )
    ids = []
    for at, value in enumerate(prompt):
        if (token := _id(value)) is None:
            raise PromptError(f"token ids: expected integers, found {value!r} at {at}")
        ids.append(token)
    return ids


def _id(value: Any) -> int | None:
    """``value`` as an int if it is an integer, also one of numpy or torch; else None."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0:  # an array of one id is a prompt
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
