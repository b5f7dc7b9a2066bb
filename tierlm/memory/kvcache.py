"""The KV cache of the running sequences: what each layer's attention keeps of a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tierlm.errors import PromptError


@dataclass(slots=True)
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
        self._used = 0

    @property
    def free(self) -> int:
        """Tokens that can still be reserved."""
        return self.capacity - self._used

    def reserve(self, tokens: int) -> Span:
        """A span for one sequence. Raises PromptError if it does not fit beside the others."""
        if tokens > self.free:
            raise PromptError(f"{tokens} tokens do not fit the context: {self.free} of {self.capacity} are free")
        span = Span(self._used, tokens)
        self._used += tokens
        return span

    def clear(self) -> None:
        """Forget all sequences."""
        self._used = 0

    def layer(self, layer: int) -> Tensor:
        """All of one layer's, [capacity, width], for kernels that write spans directly."""
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
