"""The KV cache: what attention keeps of every token, by layer, in spans that belong to sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tierlm.errors import PromptError


@dataclass(slots=True, eq=False)
class Span:
    """One sequence's place in the cache: ``start``, ``capacity`` and ``length`` in tokens."""

    start: int
    capacity: int
    length: int = 0


class KvCache:
    """Room for ``capacity`` tokens over all sequences; ``widths``: by layer, values a token."""

    def __init__(self, widths: Sequence[int], capacity: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self._layers = [torch.empty(capacity, width, dtype=dtype, device=device) for width in widths]
        self._spans: list[Span] = []  # in order of their starts

    def can_reserve(self, tokens: int) -> bool:
        """Whether ``tokens`` fit in one piece beside the other sequences."""
        return self._gap(tokens) is not None

    def reserve(self, tokens: int) -> Span:
        """A span for one sequence, until ``release``. Raises PromptError where ``can_reserve`` says no."""
        place = self._gap(tokens)
        if place is None:
            free = self.capacity - sum(span.capacity for span in self._spans)
            raise PromptError(f"{tokens} tokens do not fit the context: {free} of {self.capacity} are free")
        index, start = place
        span = Span(start, tokens)
        self._spans.insert(index, span)
        return span

    def release(self, span: Span) -> None:
        """Give the room of a sequence to others."""
        self._spans.remove(span)

    def layer(self, layer: int) -> Tensor:
        """One layer's values of all spans, [capacity, width], for kernels that write spans directly."""
        return self._layers[layer]

    def append(self, layer: int, span: Span, values: Tensor) -> Tensor:
        """Write ``values`` [T, width] behind the span's tokens; the whole of it, float32 [S, width].

        The span's length is advanced once for all layers, by the decoder.
        """
        end = span.length + values.shape[0]
        assert end <= span.capacity, "a sequence outgrew its span"
        rows = self._layers[layer][span.start : span.start + end]
        rows[span.length :] = values
        return rows.float()

    def _gap(self, tokens: int) -> tuple[int, int] | None:
        """The first gap that holds ``tokens``: before which span, and where it starts."""
        start = 0
        for index, span in enumerate(self._spans):
            if span.start - start >= tokens:
                return index, start
            start = span.start + span.capacity
        return (len(self._spans), start) if self.capacity - start >= tokens else None
