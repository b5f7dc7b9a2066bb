"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tierlm.checkpoints.views import Weights
from tierlm.kernels import (
    LatentAttention,
    Weight,
    can_absorb,
    from_latent,
    fused_mla_decode,
    into_latent,
    linear,
    widen,
)
from tierlm.memory.kvcache import KvCache, Span
from tierlm.models.layers import rms_norm, rope_frequencies, rotate, softmax_scale
from tierlm.spec import ModelSpec

LATENT_NORM_EPS = 1e-6  # of the norms inside attention: fixed in DeepSeek's code, whatever rms_norm_eps says
EXPAND_FROM = 128  # tokens a step from which expanding keys and values costs less than absorbing the projections
SCORES = 2**23  # float32 scores held at a time
HEADS_VALUES = 2**18  # float32 values of kv_b widened at a time


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one sequence within a step: rows ``start`` to ``stop``, and the sequence's place in the cache."""

    start: int
    stop: int
    span: Span


@dataclass(frozen=True, slots=True)
class Positions:
    """``places``: int64 [T, 2], where each token's sequence begins in the cache, and the token's position in it.
    ``angles``: cosine and sine of the rotary embedding there, float32 [T, rope_dim / 2]."""

    segments: Sequence[Rows]
    places: Tensor
    angles: tuple[Tensor, Tensor]


class Attention:
    """The attention of all layers of one model; the weights come with each call."""

    def __init__(self, spec: ModelSpec, cache: KvCache, device: torch.device):
        self.spec, self.cache = spec, cache
        frequencies, self._rope_factor = rope_frequencies(spec.rope, spec.rope_dim)
        self._frequencies = frequencies.to(device)
        self._scale = softmax_scale(spec.rope, spec.nope_dim + spec.rope_dim)
        dims = spec.heads, spec.nope_dim, spec.rope_dim, spec.value_dim
        self._shape = LatentAttention(*dims, spec.rope.interleaved, spec.norm_eps, LATENT_NORM_EPS, self._scale)

    def positions(self, segments: Sequence[Rows]) -> Positions:
        """Where the tokens of a step are: once for all layers."""
        for segment in segments:
            end = segment.span.length + segment.stop - segment.start
            assert end <= segment.span.capacity, "a sequence outgrew its span"
        places = [(s.span.start, s.span.length + i) for s in segments for i in range(s.stop - s.start)]
        table = torch.tensor(places)
        turns = table[:, 1:].to(self._frequencies.device, torch.float32) * self._frequencies
        return Positions(segments, table, (turns.cos() * self._rope_factor, turns.sin() * self._rope_factor))

    def forward(
        self, hidden: Tensor, layer: int, trunk: Weights, next_norm: Weight, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, float32 [T, hidden], with this layer's attention, and the norm of that for what comes
        next; appends the step's latents to the cache.

        Few tokens: queries are carried into the latent space and meet the cache as it is (absorbed projections), by
        the compiled kernels in one call where they can. Many: keys and values are expanded, a few heads at a time.
        """
        spec = self.spec
        queries = (None, trunk["q_proj"]) if spec.q_rank is None else (trunk["q_a_proj"], trunk["q_b_proj"])
        matrices = *queries, trunk["kv_a_proj"], trunk["kv_b_proj"], trunk["o_proj"]
        norms = trunk["input_layernorm"], trunk.get("q_a_layernorm"), trunk["kv_a_layernorm"], next_norm
        where = self.cache.layer(layer), positions.places, positions.angles
        done = fused_mla_decode(self._shape, hidden, matrices, norms, *where)
        if done is None:
            x = rms_norm(hidden, trunk["input_layernorm"], spec.norm_eps)
            total = hidden + self._attend(x, layer, trunk, positions)
            done = total, rms_norm(total, next_norm, spec.norm_eps)
        return done

    def _attend(self, x: Tensor, layer: int, trunk: Weights, positions: Positions) -> Tensor:
        """The normed ``x`` [T, hidden] -> float32 [T, hidden]."""
        spec, segments, angles = self.spec, positions.segments, positions.angles
        heads, nope, rank = spec.heads, spec.nope_dim, spec.kv_rank
        if spec.q_rank is None:
            queries = linear(x, trunk["q_proj"])
        else:
            low = rms_norm(linear(x, trunk["q_a_proj"]), trunk["q_a_layernorm"], LATENT_NORM_EPS)
            queries = linear(low, trunk["q_b_proj"])
        queries = queries.view(len(x), heads, nope + spec.rope_dim)
        q_rope = rotate(queries[..., nope:], *angles, spec.rope.interleaved)  # [T, heads, rope]
        q_nope = queries[..., :nope]

        compressed = linear(x, trunk["kv_a_proj"])
        latent = rms_norm(compressed[:, :rank], trunk["kv_a_layernorm"], LATENT_NORM_EPS)
        key = rotate(compressed[:, None, rank:], *angles, spec.rope.interleaved)[:, 0]
        step = torch.cat((latent, key), dim=-1)  # [T, rank + rope]
        past = [self.cache.append(layer, s.span, step[s.start : s.stop]) for s in segments]

        out = x.new_empty(len(x), heads, spec.value_dim)
        tokens = max(s.stop - s.start for s in segments)
        attend = self._absorbed if tokens < EXPAND_FROM else self._expanded
        group = max(
            1, min(heads, SCORES // max((s.stop - s.start) * len(p) for s, p in zip(segments, past, strict=True)))
        )
        kv_b = trunk["kv_b_proj"]
        if not can_absorb(kv_b, tokens, nope, spec.value_dim):
            group = max(1, min(group, HEADS_VALUES // ((nope + spec.value_dim) * rank)))
        for first in range(0, heads, group):
            mine = slice(first, first + group)
            for segment, latents in zip(segments, past, strict=True):
                rows = slice(segment.start, segment.stop)
                out[rows, mine] = attend(q_nope[rows, mine], q_rope[rows, mine], latents, kv_b, first)
        return linear(out.view(len(x), heads * spec.value_dim), trunk["o_proj"])

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, past: Tensor, kv_b: Weight, first: int) -> Tensor:
        """q [T, g, .] of the heads from ``first`` on, past [S, rank + rope] -> [T, g, value]."""
        spec = self.spec
        q_latent = into_latent(q_nope, kv_b, first, spec.heads)
        query = torch.cat((q_latent, q_rope.transpose(0, 1)), dim=-1)  # [g, T, rank + rope]
        mixed = self._softmax(query @ past.t()) @ past[:, : spec.kv_rank]  # [g, T, rank]
        return from_latent(mixed, kv_b, first, spec.heads, spec.value_dim)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, past: Tensor, kv_b: Weight, first: int) -> Tensor:
        """As ``_absorbed``, with keys and values of every past token."""
        spec = self.spec
        nope, count, rows = spec.nope_dim, q_nope.shape[1], spec.nope_dim + spec.value_dim
        up = widen(kv_b, first * rows, (first + count) * rows).view(count, rows, spec.kv_rank)
        latents, shared_key = past[:, : spec.kv_rank], past[:, spec.kv_rank :]
        keys = latents @ up[:, :nope].transpose(1, 2)  # [g, S, nope]
        values = latents @ up[:, nope:].transpose(1, 2)  # [g, S, value]
        scores = torch.bmm(q_nope.transpose(0, 1), keys.transpose(1, 2)) + q_rope.transpose(0, 1) @ shared_key.t()
        return torch.bmm(self._softmax(scores), values).transpose(0, 1)

    def _softmax(self, scores: Tensor) -> Tensor:
        """Causal: the last of the T queries sees all S keys. [g, T, S] -> [g, T, S]."""
        tokens, keys = scores.shape[1:]
        scores = scores.mul_(self._scale)
        if tokens > 1:
            hidden = torch.ones(tokens, keys, dtype=torch.bool, device=scores.device).triu_(keys - tokens + 1)
            scores.masked_fill_(hidden, float("-inf"))
        return scores.softmax(dim=-1)
