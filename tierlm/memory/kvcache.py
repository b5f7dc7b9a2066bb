"""The KV cache: values per token and layer, in one contiguous span per sequence, and the states of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tierlm.errors import PromptError
from tierlm.spec import STATES

MOVED = 256  # tokens copied at a time


@dataclass(slots=True, eq=False)
class Span:
    """One sequence's part of the cache. ``start``, ``capacity`` and ``length`` are in tokens.

    ``place``: of its state, -1 if the model has none. ``turn``: which of the state's two copies is the present one.
    """

    start: int
    capacity: int
    length: int = 0
    place: int = -1
    turn: int = 0

    def advance(self, tokens: int) -> None:
        """Accept what a step has appended, and the state that it has written."""
        self.length += tokens
        self.turn = 1 - self.turn

    def retract(self, tokens: int) -> None:
        """Drop the last ``tokens``. A state cannot go back: only for a model without states."""
        self.length -= tokens

    def ahead(self, tokens: int) -> Span:
        """This part of the cache as it is when ``tokens`` more are in it."""
        return replace(self, length=self.length + tokens)


class KvCache:
    """Holds ``capacity`` tokens over all sequences. ``widths``: values per token, by layer; ``index_widths``: of the
    index keys of sparse attention, if any.

    ``states``: float32 values of a sequence's state, by layer; 0: none. Then there are STATES sequences at most. A step
    reads one copy of a state and writes the other, so it may be abandoned or run again.
    """

    def __init__(
        self,
        widths: Sequence[int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        index_widths: Sequence[int] = (),
        states: Sequence[int] = (),
    ):
        self.capacity = capacity
        self._layers = [torch.empty(capacity, width, dtype=dtype, device=device) for width in widths]
        self._index = [torch.empty(capacity, width, dtype=dtype, device=device) for width in index_widths]
        self._states = [torch.empty(STATES, 2, width, device=device) for width in states]
        self._places = list(range(STATES)) if any(states) else None  # the free ones
        self._spans: list[Span] = []  # sorted by start

    @property
    def usage(self) -> tuple[int, int]:
        """Tokens held, and tokens reserved. Any thread may read it."""
        spans = list(self._spans)
        return sum(span.length for span in spans), sum(span.capacity for span in spans)

    def can_reserve(self, tokens: int, *instead_of: Span) -> bool:
        """Whether a contiguous gap of ``tokens`` and a state are free, or would be without the spans ``instead_of``."""
        if self._places == [] and not instead_of:
            return False
        without = set(instead_of)
        return self._gap([span for span in self._spans if span not in without], tokens) is not None

    def reserve(self, tokens: int) -> Span:
        """Reserve a span until ``release``. Raises PromptError if ``can_reserve`` is False."""
        place = self._gap(self._spans, tokens)
        if place is None:
            free = self.capacity - sum(span.capacity for span in self._spans)
            raise PromptError(f"{tokens} tokens do not fit the context: {free} of {self.capacity} are free")
        index, start = place
        span = Span(start, tokens)
        if self._places is not None:
            if not self._places:
                raise PromptError(f"at most {STATES} sequences at a time have a state")
            span.place = self._places.pop()
        self._spans.insert(index, span)
        return span

    def resize(self, span: Span, capacity: int) -> None:
        """Give ``span`` another capacity, in its place if there is room, if not elsewhere.

        ``can_reserve(capacity, span)`` must hold.
        """
        self._spans.remove(span)
        after = next((other.start for other in self._spans if other.start > span.start), self.capacity)
        if span.start + capacity > after:
            place = self._gap(self._spans, capacity)
            assert place is not None, "a span that has no room"
            self._move(span, place[1])
        span.capacity = capacity
        self._spans = sorted([*self._spans, span], key=lambda span: span.start)

    def release(self, span: Span) -> None:
        """Free ``span``."""
        self._spans.remove(span)
        if self._places is not None:
            self._places.append(span.place)

    @property
    def can_cut(self) -> bool:
        """Whether the first tokens of a span are of use without the others. A state cannot go back."""
        return self._places is None

    def copy(self, source: Span, span: Span, length: int) -> None:
        """Fill the empty ``span`` with the first ``length`` tokens of ``source``. ``can_cut`` must hold."""
        for values in (*self._layers, *self._index):
            values[span.start :][:length] = values[source.start :][:length]
        span.length = length

    def layer(self, layer: int) -> Tensor:
        """One layer's values of all spans, [capacity, width], for kernels that write spans directly."""
        return self._layers[layer]

    def state(self, layer: int, span: Span) -> tuple[Tensor, Tensor]:
        """The state of ``span`` at this layer, zero before its first token, and where a step writes the next one: both
        float32 [width]."""
        now, later = self._states[layer][span.place, span.turn], self._states[layer][span.place, 1 - span.turn]
        return (now if span.length else now.zero_()), later

    def append(self, layer: int, span: Span, values: Tensor) -> Tensor:
        """Append ``values`` [T, width] to the span. Returns all its values, float32 [S, width].

        The decoder advances the span once, after all layers.
        """
        return _append(self._layers[layer], span, values)

    def append_index(self, layer: int, span: Span, keys: Tensor) -> Tensor:
        """``append`` for index keys."""
        return _append(self._index[layer], span, keys)

    def _move(self, span: Span, start: int) -> None:
        """Copy the values of ``span`` block by block, since the old place and the new may overlap."""
        blocks = range(0, span.length, MOVED)
        for values in (*self._layers, *self._index):
            for at in blocks if start < span.start else reversed(blocks):
                rows = min(MOVED, span.length - at)
                values[start + at :][:rows] = values[span.start + at :][:rows].clone()
        span.start = start

    def _gap(self, spans: Sequence[Span], tokens: int) -> tuple[int, int] | None:
        """The first gap of at least ``tokens`` between ``spans``: index of the span after it, and its start."""
        start = 0
        for index, span in enumerate(spans):
            if span.start - start >= tokens:
                return index, start
            start = span.start + span.capacity
        return (len(spans), start) if self.capacity - start >= tokens else None


def _append(stored: Tensor, span: Span, values: Tensor) -> Tensor:
    end = span.length + values.shape[0]
    assert end <= span.capacity, "a sequence outgrew its span"
    rows = stored[span.start : span.start + end]
    rows[span.length :] = values
    return rows.float()
