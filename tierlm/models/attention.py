"""The interface between attention and decoder, and code shared by all kinds of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tierlm.attention_spec import Rope
from tierlm.checkpoints.views import Weights
from tierlm.kernels import Weight
from tierlm.memory.kvcache import Span
from tierlm.models.layers import rope_frequencies


@dataclass(frozen=True, slots=True)
class Rows:
    """One sequence's tokens in a step: rows ``start`` to ``stop``, and the sequence's span in the cache."""

    start: int
    stop: int
    span: Span


@dataclass(frozen=True, slots=True)
class Positions:
    """``places``: int64 [T, 2], the cache row where each token's sequence begins, and the token's position in it.
    ``angles``: cosine and sine of the rotary embedding at that position, float32 [T, dim / 2]. Both empty without
    rotary embedding. ``chosen``: of each sequence, by its first row, the keys that sparse attention chose in the last
    layer that did: int64 [T, chosen]; none if it attends to all."""

    segments: Sequence[Rows]
    places: Tensor
    angles: tuple[Tensor, Tensor]
    chosen: dict[int, Tensor] = field(default_factory=dict)


class Attention(Protocol):
    """The attention of all layers of one kind; each call passes the weights.

    To add a kind: a spec in spec.py, tensor names in models/family.py, a class with this interface, and a line in
    ``attention_of`` (models/decoder.py). Other sequences in a step change at most the last bits of a result.
    """

    def positions(self, segments: Sequence[Rows]) -> Positions:
        """The positions of a step's tokens. Called once for all layers."""

    def forward(
        self, hidden: Tensor, layer: int, trunk: Weights, next_norm: Weight, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Appends the step to the cache. Returns the residual stream plus attention, and its norm for the feed-forward
        block, both float32 [T, hidden]."""


class Rotary:
    """The angles of rotary embedding. ``dim``: rotated dimensions of a head."""

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


def causal_softmax(
    scores: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    unseen: Tensor | None = None,
) -> Tensor:
    """Softmax of ``scale * scores`` [g, T, S]. The last of T queries is at the place of the last key. Overwrites
    ``scores``. ``window``: keys that a query sees, up to its own. ``sinks`` [g]: one more logit in each sum. ``unseen``
    [T, S]: keys that a query does not see.
    """
    tokens, keys = scores.shape[1:]
    scores = scores.mul_(scale)
    if tokens > 1:
        ones = torch.ones(tokens, keys, dtype=torch.bool, device=scores.device)
        scores.masked_fill_(ones.triu(keys - tokens + 1), float("-inf"))
        if window is not None and keys > window:
            scores.masked_fill_(ones.tril_(keys - tokens - window), float("-inf"))
    if unseen is not None:
        scores.masked_fill_(unseen, float("-inf"))
    if sinks is None:
        return scores.softmax(dim=-1)
    extra = sinks[:, None, None]
    peak = torch.maximum(scores.amax(-1, keepdim=True), extra)
    shares = scores.sub_(peak).exp_()
    return shares.div_(shares.sum(-1, keepdim=True) + (extra - peak).exp())
