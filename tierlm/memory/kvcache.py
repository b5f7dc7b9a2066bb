"""The latent KV cache of the running sequences (MLA): one latent and one rotated key a token and layer."""

from __future__ import annotations

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
    """Room for ``capacity`` tokens over all sequences: [layers, capacity, kv_rank + rope_dim]."""

    def __init__(self, layers: int, capacity: int, latent_dim: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self._values = torch.empty(layers, capacity, latent_dim, dtype=dtype, device=device)
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
        """All of one layer's, [capacity, kv_rank + rope_dim], for who appends to spans on his own."""
        return self._values[layer]

    def append(self, layer: int, span: Span, latent: Tensor) -> Tensor:
        """Write ``latent`` [T, kv_rank + rope_dim] behind the span's tokens; the whole of it, float32 [S, ...].

        The span's length is advanced once for all layers, by the decoder.
        """
        end = span.length + latent.shape[0]
        assert end <= span.capacity, "a sequence outgrew its span"
        rows = self._values[layer, span.start : span.start + end]
        rows[span.length :] = latent
        return rows.float()
