"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tierlm.attention_spec import EXPANDED_VALUES, SCORE_VALUES, WIDENED_HEADS, Latent
from tierlm.checkpoints.views import Weights
from tierlm.kernels import (
    ABSORB_ROWS,
    LatentAttention,
    Weight,
    attend_chunk,
    attend_latents,
    can_absorb,
    from_latent,
    fused_mla_decode,
    into_latent,
    linear,
    widen,
)
from tierlm.memory.kvcache import KvCache
from tierlm.models.attention import Positions, Rotary, Rows, causal_softmax
from tierlm.models.indexer import KeyChooser
from tierlm.models.layers import rms_norm, rotate, softmax_scale

LATENT_NORM_EPS = 1e-6  # for the norms inside attention: fixed in DeepSeek's code, independent of rms_norm_eps
EXPAND_FROM = 128  # new tokens of a sequence at which expanding its keys and values beats absorbed projections


class Up(Protocol):
    """The projection from latents to keys and values, for ``g`` heads starting at ``first``."""

    def stays(self, rows: int) -> bool:
        """Whether this many rows are multiplied with the stored weights, without widening them."""

    def into_latent(self, q: Tensor, first: int) -> Tensor:
        """float32 [T, g, nope] -> float32 [g, T, rank]."""

    def from_latent(self, mixed: Tensor, first: int) -> Tensor:
        """float32 [g, T, rank] -> float32 [T, g, value]."""

    def widened(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """float32 [g, rank, nope] and [g, rank, value]."""


class WholeUp:
    """kv_b_proj as published: the rows of a head are its keys, then its values."""

    def __init__(self, spec: Latent, kv_b: Weight):
        self.spec, self.kv_b = spec, kv_b

    def stays(self, rows: int) -> bool:
        return can_absorb(self.kv_b, rows, self.spec.nope_dim, self.spec.value_dim)

    def into_latent(self, q: Tensor, first: int) -> Tensor:
        return into_latent(q, self.kv_b, first, self.spec.heads)

    def from_latent(self, mixed: Tensor, first: int) -> Tensor:
        return from_latent(mixed, self.kv_b, first, self.spec.heads, self.spec.value_dim)

    def widened(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        rows = self.spec.nope_dim + self.spec.value_dim
        wide = widen(self.kv_b, first * rows, (first + count) * rows).view(count, rows, -1).transpose(1, 2)
        return wide[..., : self.spec.nope_dim], wide[..., self.spec.nope_dim :]


class SplitUp:
    """Keys and values apart, as in GGUF. The rows of a head of k_b are the latent's."""

    def __init__(self, spec: Latent, k_b: Weight, v_b: Weight):
        self.spec, self.k_b, self.v_b = spec, k_b, v_b

    def stays(self, rows: int) -> bool:
        return all(can_absorb(half, rows, 0, half.shape[0] // self.spec.heads) for half in (self.k_b, self.v_b))

    def into_latent(self, q: Tensor, first: int) -> Tensor:
        heads_first = q.transpose(0, 1).contiguous()
        return from_latent(heads_first, self.k_b, first, self.spec.heads, self.spec.kv_rank).transpose(0, 1)

    def from_latent(self, mixed: Tensor, first: int) -> Tensor:
        return from_latent(mixed, self.v_b, first, self.spec.heads, self.spec.value_dim)

    def widened(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        def half(weight: Weight, rows: int) -> Tensor:
            return widen(weight, first * rows, (first + count) * rows).view(count, rows, -1)

        return half(self.k_b, self.spec.kv_rank), half(self.v_b, self.spec.value_dim).transpose(1, 2)


class LatentHeads:
    """``Attention`` for layers with this ``spec``; ``norm_eps`` applies to the norms around it."""

    def __init__(self, spec: Latent, norm_eps: float, cache: KvCache, device: torch.device):
        self.spec, self.norm_eps, self.cache = spec, norm_eps, cache
        self._rotary = Rotary(spec.rope, spec.rope_dim, device)
        self._scale = softmax_scale(spec.rope, spec.nope_dim + spec.rope_dim)
        dims = spec.heads, spec.nope_dim, spec.rope_dim, spec.value_dim
        self._chooser = None if spec.indexer is None else KeyChooser(spec.indexer, spec.rope_dim, cache)
        self._shape = LatentAttention(*dims, spec.rope.interleaved, norm_eps, LATENT_NORM_EPS, self._scale)

    def positions(self, segments: Sequence[Rows]) -> Positions:
        return self._rotary.positions(segments)

    def forward(
        self, hidden: Tensor, layer: int, trunk: Weights, next_norm: Weight, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Few tokens: queries are projected into the latent space and multiplied with the cache directly (absorbed
        projections), in one kernel call if possible. Many: keys and values are expanded, a few heads at a time."""
        queries = (None, trunk["q_proj"]) if self.spec.q_rank is None else (trunk["q_a_proj"], trunk["q_b_proj"])
        names = ("k_b_proj", "v_b_proj") if self.spec.split else ("kv_b_proj", "")
        matrices = *queries, trunk["kv_a_proj"], *map(trunk.get, names), trunk["o_proj"]
        norms = trunk["input_layernorm"], trunk.get("q_a_layernorm"), trunk["kv_a_layernorm"], next_norm
        sparse = self._chooser is not None and self._chooser.needed(positions.segments)
        done = None if sparse else self._fused(hidden, layer, matrices, norms, positions)
        if done is None:
            x = rms_norm(hidden, trunk["input_layernorm"], self.norm_eps)
            total = hidden + self._attend(x, layer, trunk, positions)
            done = total, rms_norm(total, next_norm, self.norm_eps)
        elif self._chooser is not None:
            self._chooser.append(rms_norm(hidden, trunk["input_layernorm"], self.norm_eps), layer, trunk, positions)
        return done

    def _fused(
        self,
        hidden: Tensor,
        layer: int,
        matrices: Sequence[Weight | None],
        norms: Sequence[Weight | None],
        positions: Positions,
    ) -> tuple[Tensor, Tensor] | None:
        """``fused_mla_decode``. A decode step of more sequences than it takes goes in groups."""
        cache, places, (cosine, sine) = self.cache.layer(layer), positions.places, positions.angles
        if len(hidden) <= ABSORB_ROWS or len(positions.segments) < len(hidden):
            return fused_mla_decode(self._shape, hidden, matrices, norms, cache, places, positions.angles)
        parts = []
        for first in range(0, len(hidden), ABSORB_ROWS):
            rows = slice(first, first + ABSORB_ROWS)
            where = cache, places[rows], (cosine[rows], sine[rows])
            if (part := fused_mla_decode(self._shape, hidden[rows], matrices, norms, *where)) is None:
                return None
            parts.append(part)
        totals, normed = zip(*parts, strict=True)
        return torch.cat(totals), torch.cat(normed)

    def _attend(self, x: Tensor, layer: int, trunk: Weights, positions: Positions) -> Tensor:
        """Normed ``x`` [T, hidden] -> float32 [T, hidden]."""
        spec, segments, angles = self.spec, positions.segments, positions.angles
        heads, nope, rank = spec.heads, spec.nope_dim, spec.kv_rank
        if spec.q_rank is None:
            queries = linear(x, trunk["q_proj"])
        else:
            low = rms_norm(linear(x, trunk["q_a_proj"]), trunk["q_a_layernorm"], LATENT_NORM_EPS)
            queries = linear(low, trunk["q_b_proj"])
            if self._chooser is not None:
                self._chooser.choose(x, low, layer, trunk, positions)
        queries = queries.view(len(x), heads, nope + spec.rope_dim)
        q_rope = rotate(queries[..., nope:], *angles, spec.rope.interleaved)
        queries = torch.cat((queries[..., :nope], q_rope), dim=-1)  # [T, heads, nope + rope]

        compressed = linear(x, trunk["kv_a_proj"])
        latent = rms_norm(compressed[:, :rank], trunk["kv_a_layernorm"], LATENT_NORM_EPS)
        key = rotate(compressed[:, None, rank:], *angles, spec.rope.interleaved)[:, 0]
        step = torch.cat((latent, key), dim=-1)  # [T, rank + rope]

        out = x.new_empty(len(x), heads, spec.value_dim)
        up = (
            WholeUp(spec, trunk["kv_b_proj"]) if not spec.split else SplitUp(spec, trunk["k_b_proj"], trunk["v_b_proj"])
        )
        for segment in segments:
            rows = slice(segment.start, segment.stop)
            past = self.cache.append(layer, segment.span, step[rows])  # [S, rank + rope]
            chosen = positions.chosen.get(segment.start)
            if chosen is not None or not self._in_kernels(queries[rows], past, up, out[rows]):
                self._in_torch(queries[rows], past.float(), chosen, up, out[rows])
        return linear(out.view(len(x), heads * spec.value_dim), trunk["o_proj"])

    def _in_kernels(self, queries: Tensor, past: Tensor, up: Up, out: Tensor) -> bool:
        """One sequence: queries [T, heads, nope + rope], past [S, rank + rope] -> ``out`` [T, heads, value]. False
        without kernels."""
        spec, tokens, done = self.spec, len(queries), True
        group = spec.heads if up.stays(tokens) else WIDENED_HEADS
        for first in range(0, spec.heads, group):
            query, to = queries[:, first : first + group], out[:, first : first + group]
            if tokens >= EXPAND_FROM:
                widened = up.widened(first, query.shape[1])
                done = attend_latents(query, *widened, past, self._scale, to)
            else:
                q_latent = up.into_latent(query[..., : spec.nope_dim], first).transpose(0, 1)
                query = torch.cat((q_latent, query[..., spec.nope_dim :]), dim=-1)  # [T, g, rank + rope]
                mixed = attend_chunk(query, past[:, None], past[:, None, : spec.kv_rank], self._scale)
                if done := mixed is not None:
                    to.copy_(up.from_latent(mixed.transpose(0, 1).contiguous(), first))
            if not done:
                break
        return done

    def _in_torch(self, queries: Tensor, past: Tensor, chosen: Tensor | None, up: Up, out: Tensor) -> None:
        """``_in_kernels`` in torch, to the ``chosen`` keys [T, chosen] if given."""
        spec, tokens, unseen = self.spec, len(queries), None
        if chosen is not None and tokens == 1:
            past = past[chosen[0]]
        elif chosen is not None:
            unseen = torch.ones(tokens, len(past), dtype=torch.bool, device=past.device).scatter_(1, chosen, False)
        attend = self._absorbed if tokens < EXPAND_FROM else self._expanded
        group = SCORE_VALUES // (tokens * len(past))
        if not up.stays(tokens):
            group = min(group, EXPANDED_VALUES // ((spec.nope_dim + spec.value_dim) * spec.kv_rank))
        group = max(1, min(spec.heads, group))
        for first in range(0, spec.heads, group):
            mine = slice(first, first + group)
            q_nope, q_rope = queries[:, mine, : spec.nope_dim], queries[:, mine, spec.nope_dim :]
            out[:, mine] = attend(q_nope, q_rope, past, unseen, up, first)

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, past: Tensor, unseen: Tensor | None, up: Up, first: int
    ) -> Tensor:
        """q [T, g, .] of the g heads starting at ``first``, past [S, rank + rope] -> [T, g, value]. ``unseen`` [T, S]:
        keys that a query does not attend to."""
        q_latent = up.into_latent(q_nope, first)
        query = torch.cat((q_latent, q_rope.transpose(0, 1)), dim=-1)  # [g, T, rank + rope]
        shares = causal_softmax(query @ past.t(), self._scale, unseen=unseen)
        mixed = shares @ past[:, : self.spec.kv_rank]  # [g, T, rank]
        return up.from_latent(mixed, first)

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, past: Tensor, unseen: Tensor | None, up: Up, first: int
    ) -> Tensor:
        """Same result as ``_absorbed``, with expanded keys and values."""
        to_keys, to_values = up.widened(first, q_nope.shape[1])
        latents, shared_key = past[:, : self.spec.kv_rank], past[:, self.spec.kv_rank :]
        keys = latents @ to_keys  # [g, S, nope]
        values = latents @ to_values  # [g, S, value]
        scores = torch.bmm(q_nope.transpose(0, 1), keys.transpose(1, 2)) + q_rope.transpose(0, 1) @ shared_key.t()
        return torch.bmm(causal_softmax(scores, self._scale, unseen=unseen), values).transpose(0, 1)
