"""What every kind of attention is to the decoder, and what the kinds share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tierlm.checkpoints.views import Weights
from tierlm.kernels import Weight
from tierlm.memory.kvcache import Span
from tierlm.models.layers import rope_frequencies
from tierlm.spec import Rope


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one sequence within a step: rows ``start`` to ``stop``, and the sequence's place in the cache."""

    start: int
    stop: int
    span: Span


@dataclass(frozen=True, slots=True)
class Positions:
    """``places``: int64 [T, 2], where each token's sequence begins in the cache, and the token's position in it.
    ``angles``: cosine and sine of the rotary embedding there, float32 [T, dim / 2]."""

    segments: Sequence[Rows]
    places: Tensor
    angles: tuple[Tensor, Tensor]


class Attention(Protocol):
    """The attention of all layers of one kind; the weights come with each call.

    To add a kind: its spec in spec.py, the names of its tensors in models/family.py, a class like this one, and a line
    in ``attention_of`` (models/decoder.py). What a sequence gets does not depend on the others of the step.
    """

    def positions(self, segments: Sequence[Rows]) -> Positions:
        """Where the tokens of a step are: once for all layers."""

    def forward(
        self, hidden: Tensor, layer: int, trunk: Weights, next_norm: Weight, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, float32 [T, hidden], with this layer's attention, and the norm of that for what comes
        next; appends the step to the cache."""


class Rotary:
    """The angles of rotary embedding. ``dim``: of a head, as far as it is rotated."""

    def __init__(self, rope: Rope, dim: int, device: torch.device):
        frequencies, self._factor = rope_frequencies(rope, dim)
        self._frequencies = frequencies.to(device)

    def positions(self, segments: Sequence[Rows]) -> Positions:
        for segment in segments:
            end = segment.span.length + segment.stop - segment.start
            assert end <= segment.span.capacity, "a sequence outgrew its span"
        table = torch.tensor([(s.span.start, s.span.length + i) for s in segments for i in range(s.stop - s.start)])
        turns = table[:, 1:].to(self._frequencies.device, torch.float32) * self._frequencies
        return Positions(segments, table, (turns.cos() * self._factor, turns.sin() * self._factor))


def causal_softmax(scores: Tensor, scale: float) -> Tensor:
    """Of ``scores`` [g, T, S], which are overwritten, times ``scale``: the last of T queries sees all S keys."""
    tokens, keys = scores.shape[1:]
    scores = scores.mul_(scale)
    if tokens > 1:
        hidden = torch.ones(tokens, keys, dtype=torch.bool, device=scores.device).triu_(keys - tokens + 1)
        scores.masked_fill_(hidden, float("-inf"))
    return scores.softmax(dim=-1)
