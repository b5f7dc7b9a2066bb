"""Grouped-query attention (Ainslie et al., arXiv 2305.13245), with optional RMSNorm of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tierlm.checkpoints.views import Weights
from tierlm.kernels import Weight, linear
from tierlm.memory.kvcache import KvCache
from tierlm.models.attention import Positions, Rotary, Rows, causal_softmax
from tierlm.models.layers import rms_norm, rotate, softmax_scale
from tierlm.spec import SCORE_VALUES, Grouped


class GroupedHeads:
    """``Attention`` for layers with this ``spec``; ``norm_eps`` applies to all norms."""

    def __init__(self, spec: Grouped, norm_eps: float, cache: KvCache, device: torch.device):
        self.spec, self.norm_eps, self.cache = spec, norm_eps, cache
        self._rotary = Rotary(spec.rope, spec.head_dim, device)
        self._scale = softmax_scale(spec.rope, spec.head_dim)
        self._sharing = spec.heads // spec.kv_heads  # query heads per head of keys and values

    def positions(self, segments: Sequence[Rows]) -> Positions:
        return self._rotary.positions(segments)

    def forward(
        self, hidden: Tensor, layer: int, trunk: Weights, next_norm: Weight, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Query heads that share keys and values are multiplied with them in one product, directly in the cache."""
        spec, eps, (cos, sin) = self.spec, self.norm_eps, positions.angles
        tokens, dim = len(hidden), spec.head_dim
        x = rms_norm(hidden, trunk["input_layernorm"], eps)
        queries = linear(x, trunk["q_proj"]).view(tokens, spec.heads, dim)
        keys = linear(x, trunk["k_proj"]).view(tokens, spec.kv_heads, dim)
        if spec.qk_norm:
            queries, keys = rms_norm(queries, trunk["q_norm"], eps), rms_norm(keys, trunk["k_norm"], eps)
        queries = rotate(queries, cos, sin, spec.rope.interleaved)
        keys = rotate(keys, cos, sin, spec.rope.interleaved)
        step = torch.cat((keys.flatten(1), linear(x, trunk["v_proj"])), dim=-1)  # [T, 2 * kv_heads * dim]
        out = torch.empty_like(queries)
        for segment in positions.segments:
            rows = slice(segment.start, segment.stop)
            past = self.cache.append(layer, segment.span, step[rows])  # [S, 2 * kv_heads * dim]
            self._attend(queries[rows], past, out[rows])
        total = hidden + linear(out.view(tokens, spec.query_width), trunk["o_proj"])
        return total, rms_norm(total, next_norm, eps)

    def _attend(self, queries: Tensor, past: Tensor, out: Tensor) -> None:
        """One sequence: queries [T, heads, dim], past [S, 2 * kv_heads * dim] -> ``out`` [T, heads, dim]."""
        spec, sharing, (tokens, heads, dim) = self.spec, self._sharing, queries.shape
        stored = past.view(len(past), 2, spec.kv_heads, dim)
        keys, values = stored[:, 0].permute(1, 2, 0), stored[:, 1].transpose(0, 1)  # [kv, dim, S], [kv, S, dim]
        group = max(1, min(heads, SCORE_VALUES // (tokens * len(past))))
        if group >= sharing:
            group -= group % sharing
        else:  # a group of query heads never spans two heads of keys and values
            group = next(count for count in range(group, 0, -1) if sharing % count == 0)
        for first in range(0, heads, group):
            count = min(group, heads - first)
            mine, own = slice(first, first + count), slice(first // sharing, -(-(first + count) // sharing))
            together = -(-count // (own.stop - own.start))
            query = queries[:, mine].transpose(0, 1).reshape(-1, together * tokens, dim)  # [kv, heads * T, dim]
            scores = torch.bmm(query, keys[own]).view(count, tokens, -1)
            shares = causal_softmax(scores, self._scale).view(-1, together * tokens, len(past))
            out[:, mine] = torch.bmm(shares, values[own]).view(count, tokens, dim).transpose(0, 1)
