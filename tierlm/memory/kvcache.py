"""The KV cache: values per token and layer, in one contiguous span per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tierlm.errors import PromptError

MOVED = 256  # tokens copied at a time


@dataclass(slots=True, eq=False)
class Span:
    """One sequence's part of the cache. All fields are in tokens."""

    start: int
    capacity: int
    length: int = 0


class KvCache:
    """Holds ``capacity`` tokens over all sequences. ``widths``: values per token, by layer; ``index_widths``: of the
    index keys of sparse attention, if any."""

    def __init__(
        self,
        widths: Sequence[int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        index_widths: Sequence[int] = (),
    ):
        self.capacity = capacity
        self._layers = [torch.empty(capacity, width, dtype=dtype, device=device) for width in widths]
        self._index = [torch.empty(capacity, width, dtype=dtype, device=device) for width in index_widths]
        self._spans: list[Span] = []  # sorted by start

    def can_reserve(self, tokens: int, instead_of: Span | None = None) -> bool:
        """Whether a contiguous gap of ``tokens`` is free, or would be without ``instead_of``."""
        return self._gap([span for span in self._spans if span is not instead_of], tokens) is not None

    def reserve(self, tokens: int) -> Span:
        """Reserve a span until ``release``. Raises PromptError if ``can_reserve`` is False."""
        place = self._gap(self._spans, tokens)
        if place is None:
            free = self.capacity - sum(span.capacity for span in self._spans)
            raise PromptError(f"{tokens} tokens do not fit the context: {free} of {self.capacity} are free")
        index, start = place
        span = Span(start, tokens)
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

    def layer(self, layer: int) -> Tensor:
        """One layer's values of all spans, [capacity, width], for kernels that write spans directly."""
        return self._layers[layer]

    def append(self, layer: int, span: Span, values: Tensor) -> Tensor:
        """Append ``values`` [T, width] to the span. Returns all its values, float32 [S, width].

        The decoder advances ``span.length`` once, after all layers.
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
