"""Drafts by a model's layer of multi-token prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from tierlm.engine.sequence import Sequence
from tierlm.errors import StorageError
from tierlm.memory.kvcache import Span
from tierlm.models.mtp import FEW, PredictionLayer

DRAFTS = 3  # at most: from the second on, the layer reads its own states instead of the model's


class MultiTokenPrediction:
    """Drafts with ``layer``, which has read the sequence from the token ``_first`` on: prompt and answer, unless drafts
    were not wanted for a while. What it has not read is left out, since only drafts depend on it.

    Its keys and values are in the sequence's own span, which has the layer's part at each token's place. Rotations
    depend on differences of positions only, so they count from ``_first``.
    """

    free = False

    def __init__(self, layer: PredictionLayer):
        self._layer = layer
        self._span: Span | None = None  # of the sequence, when ``_read`` was counted
        self._first = self._read = 0  # the first token, and the number of tokens in the layer's cache
        self._states: Tensor | None = None  # of the tokens after those, [n, hidden]

    def observe(self, sequence: Sequence, states: Tensor) -> None:
        """See ``Drafter``. A prompt is read at once, but for its last token; what follows, when drafts are wanted."""
        assert sequence.span is not None
        start, waiting = sequence.span.length - len(states), self._states
        prompt = len(sequence.ids) <= 1
        known = self._span is sequence.span and self._first + self._read + _rows(waiting) == start
        if not known or (_rows(waiting) + len(states) > FEW and not prompt):
            self._span, self._first, self._read, waiting = sequence.span, start, 0, None
        self._states = states if waiting is None else torch.cat((waiting, states))
        if prompt and len(self._states) > 1:
            self._run(sequence, len(self._states) - 1)

    def kinds(self, sequence: Sequence, most: int) -> list[int]:
        assert sequence.span is not None
        ready = self._span is sequence.span and self._first + self._read + _rows(self._states) == sequence.span.length
        return list(range(min(most, DRAFTS))) if ready and self._states is not None else []

    def draft(self, sequence: Sequence, count: int) -> list[int]:
        found: list[int] = []
        if not count or self._states is None or (states := self._run(sequence, len(self._states))) is None:
            return found
        ahead = self._own()
        try:
            found.append(self._layer.token(states[-1:]))
            while len(found) < count:
                states = self._layer.forward(states[-1:], found[-1:], ahead)
                found.append(self._layer.token(states))
        except StorageError:
            pass  # fewer drafts
        return found

    def _run(self, sequence: Sequence, count: int) -> Tensor | None:
        """Run the layer on the first ``count`` states that wait. Returns its own; None if a read fails, which is no
        request's error."""
        assert self._states is not None
        own, states = self._own(), self._states
        after = self._first + self._read + 1
        ids = sequence.tokens[after : after + count]
        try:
            found = self._layer.forward(states[:count], ids, own)
        except StorageError:
            self._span = self._states = None
            return None
        self._read, self._states = self._read + count, states[count:] if count < len(states) else None
        return found

    def _own(self) -> Span:
        """The layer's part of the span, from the first token that it has read."""
        span, first = self._span, self._first
        assert span is not None
        return Span(span.start + first, span.capacity - first, self._read)


def _rows(states: Tensor | None) -> int:
    return 0 if states is None else len(states)
