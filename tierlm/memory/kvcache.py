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
    """One sequence's part of the cache. ``start``, ``capacity`` and ``length`` are in tokens. ``start`` may change
    between steps, when the cache makes room for another span.

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

    Kernels need the rows of a sequence in one piece, and spans grow. A new span is put into the middle of the largest
    gap, so that it and the span before it both have room to grow. If no gap is large enough, all spans are spread out,
    with equal room behind each. What matters is whether tokens are free, never where.
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

    @property
    def free(self) -> int:
        """Tokens that are not reserved."""
        return self.capacity - sum(span.capacity for span in self._spans)

    def can_reserve(self, tokens: int, *instead_of: Span) -> bool:
        """Whether ``tokens`` and a state are free, or would be without the spans ``instead_of``."""
        free = self.free + sum(span.capacity for span in instead_of)
        return tokens <= free and (self._places != [] or bool(instead_of))

    def reserve(self, tokens: int) -> Span:
        """Reserve a span until ``release``. Raises PromptError if ``can_reserve`` is False."""
        if tokens > self.free:
            raise PromptError(f"{tokens} tokens do not fit the context: {self.free} of {self.capacity} are free")
        span = Span(0, tokens)
        if self._places is not None:
            if not self._places:
                raise PromptError(f"at most {STATES} sequences at a time have a state")
            span.place = self._places.pop()
        self._insert(span)
        return span

    def resize(self, span: Span, capacity: int) -> None:
        """Give ``span`` another capacity, in its place if there is room, if not elsewhere.

        ``can_reserve(capacity, span)`` must hold.
        """
        assert self.can_reserve(capacity, span), "a span that has no room"
        at = self._spans.index(span)
        after = self._spans[at + 1].start if at + 1 < len(self._spans) else self.capacity
        span.capacity = capacity
        if span.start + capacity > after:
            del self._spans[at]
            self._insert(span)

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

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's values in all layers."""
        return sum(values.shape[1] * values.element_size() for values in (*self._layers, *self._index))

    def rows(self, span: Span, first: int, end: int) -> list[Tensor]:
        """Views of the tokens ``first`` to ``end`` of ``span``: [end - first, width] of each layer, then index keys."""
        return [values[span.start + first : span.start + end] for values in (*self._layers, *self._index)]

    def layer(self, layer: int) -> Tensor:
        """One layer's values of all spans, [capacity, width], for kernels that write spans directly."""
        return self._layers[layer]

    def state(self, layer: int, span: Span) -> tuple[Tensor, Tensor]:
        """The state of ``span`` at this layer, zero before its first token, and where a step writes the next one: both
        float32 [width]."""
        now, later = self._states[layer][span.place, span.turn], self._states[layer][span.place, 1 - span.turn]
        return (now if span.length else now.zero_()), later

    def append(self, layer: int, span: Span, values: Tensor) -> Tensor:
        """Append ``values`` [T, width] to the span. Returns all its values as stored, a view [S, width].

        The decoder advances the span once, after all layers.
        """
        return _append(self._layers[layer], span, values)

    def append_index(self, layer: int, span: Span, keys: Tensor) -> Tensor:
        """``append`` for index keys."""
        return _append(self._index[layer], span, keys)

    def _insert(self, span: Span) -> None:
        """Put ``span`` into the largest gap, and move its values there. Its tokens are free."""
        edges = [0, *(one.start + one.capacity for one in self._spans)]
        ends = [*(one.start for one in self._spans), self.capacity]
        gaps = [end - start for start, end in zip(edges, ends, strict=True)]
        at = max(range(len(gaps)), key=gaps.__getitem__)
        if gaps[at] >= span.capacity:
            self._move(span, edges[at] + (gaps[at] - span.capacity) // 2 if at else 0)
            self._spans.insert(at, span)
        else:
            self._spans = sorted([*self._spans, span], key=lambda one: one.start)
            self._spread()

    def _spread(self) -> None:
        """Give each span the same room behind it. First those that move down, from below, then those that move up, from
        above: so none is overwritten before it has moved."""
        room, starts, start = self.free // len(self._spans), list[int](), 0
        for span in self._spans:
            starts.append(start)
            start += span.capacity + room
        moves = list(zip(self._spans, starts, strict=True))
        for span, start in moves:
            if start < span.start:
                self._move(span, start)
        for span, start in reversed(moves):
            if start > span.start:
                self._move(span, start)

    def _move(self, span: Span, start: int) -> None:
        """Copy the values of ``span`` block by block, since the old place and the new may overlap."""
        blocks = range(0, span.length, MOVED)
        for values in (*self._layers, *self._index):
            for at in blocks if start < span.start else reversed(blocks):
                rows = min(MOVED, span.length - at)
                values[start + at :][:rows] = values[span.start + at :][:rows].clone()
        span.start = start


def _append(stored: Tensor, span: Span, values: Tensor) -> Tensor:
    end = span.length + values.shape[0]
    assert end <= span.capacity, "a sequence outgrew its span"
    rows = stored[span.start : span.start + end]
    rows[span.length :] = values
    return rows
