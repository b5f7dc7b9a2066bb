"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

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
from tierlm.memory.kvcache import KvCache
from tierlm.models.attention import Positions, Rotary, Rows, causal_softmax
from tierlm.models.layers import rms_norm, rotate, softmax_scale
from tierlm.spec import EXPANDED_VALUES, SCORE_VALUES, Latent

LATENT_NORM_EPS = 1e-6  # for the norms inside attention: fixed in DeepSeek's code, independent of rms_norm_eps
EXPAND_FROM = 128  # new tokens of a sequence at which expanding its keys and values beats absorbed projections


class LatentHeads:
    """``Attention`` for layers with this ``spec``; ``norm_eps`` applies to the norms around it."""

    def __init__(self, spec: Latent, norm_eps: float, cache: KvCache, device: torch.device):
        self.spec, self.norm_eps, self.cache = spec, norm_eps, cache
        self._rotary = Rotary(spec.rope, spec.rope_dim, device)
        self._scale = softmax_scale(spec.rope, spec.nope_dim + spec.rope_dim)
        dims = spec.heads, spec.nope_dim, spec.rope_dim, spec.value_dim
        self._shape = LatentAttention(*dims, spec.rope.interleaved, norm_eps, LATENT_NORM_EPS, self._scale)

    def positions(self, segments: Sequence[Rows]) -> Positions:
        return self._rotary.positions(segments)

    def forward(
        self, hidden: Tensor, layer: int, trunk: Weights, next_norm: Weight, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Few tokens: queries are projected into the latent space and multiplied with the cache directly (absorbed
        projections), in one kernel call if possible. Many: keys and values are expanded, a few heads at a time."""
        queries = (None, trunk["q_proj"]) if self.spec.q_rank is None else (trunk["q_a_proj"], trunk["q_b_proj"])
        matrices = *queries, trunk["kv_a_proj"], trunk["kv_b_proj"], trunk["o_proj"]
        norms = trunk["input_layernorm"], trunk.get("q_a_layernorm"), trunk["kv_a_layernorm"], next_norm
        where = self.cache.layer(layer), positions.places, positions.angles
        done = fused_mla_decode(self._shape, hidden, matrices, norms, *where)
        if done is None:
            x = rms_norm(hidden, trunk["input_layernorm"], self.norm_eps)
            total = hidden + self._attend(x, layer, trunk, positions)
            done = total, rms_norm(total, next_norm, self.norm_eps)
        return done

    def _attend(self, x: Tensor, layer: int, trunk: Weights, positions: Positions) -> Tensor:
        """Normed ``x`` [T, hidden] -> float32 [T, hidden]."""
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

        out = x.new_empty(len(x), heads, spec.value_dim)
        kv_b = trunk["kv_b_proj"]
        for segment in segments:
            rows, tokens = slice(segment.start, segment.stop), segment.stop - segment.start
            past = self.cache.append(layer, segment.span, step[rows])  # [S, rank + rope]
            attend = self._absorbed if tokens < EXPAND_FROM else self._expanded
            group = SCORE_VALUES // (tokens * len(past))
            if not can_absorb(kv_b, tokens, nope, spec.value_dim):
                group = min(group, EXPANDED_VALUES // ((nope + spec.value_dim) * rank))
            group = max(1, min(heads, group))
            for first in range(0, heads, group):
                mine = slice(first, first + group)
                out[rows, mine] = attend(q_nope[rows, mine], q_rope[rows, mine], past, kv_b, first)
        return linear(out.view(len(x), heads * spec.value_dim), trunk["o_proj"])

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, past: Tensor, kv_b: Weight, first: int) -> Tensor:
        """q [T, g, .] of the g heads starting at ``first``, past [S, rank + rope] -> [T, g, value]."""
        spec = self.spec
        q_latent = into_latent(q_nope, kv_b, first, spec.heads)
        query = torch.cat((q_latent, q_rope.transpose(0, 1)), dim=-1)  # [g, T, rank + rope]
        mixed = causal_softmax(query @ past.t(), self._scale) @ past[:, : spec.kv_rank]  # [g, T, rank]
        return from_latent(mixed, kv_b, first, spec.heads, spec.value_dim)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, past: Tensor, kv_b: Weight, first: int) -> Tensor:
        """Same result as ``_absorbed``, with expanded keys and values."""
        spec = self.spec
        nope, count, rows = spec.nope_dim, q_nope.shape[1], spec.nope_dim + spec.value_dim
        up = widen(kv_b, first * rows, (first + count) * rows).view(count, rows, spec.kv_rank)
        latents, shared_key = past[:, : spec.kv_rank], past[:, spec.kv_rank :]
        keys = latents @ up[:, :nope].transpose(1, 2)  # [g, S, nope]
        values = latents @ up[:, nope:].transpose(1, 2)  # [g, S, value]
        scores = torch.bmm(q_nope.transpose(0, 1), keys.transpose(1, 2)) + q_rope.transpose(0, 1) @ shared_key.t()
        return torch.bmm(causal_softmax(scores, self._scale), values).transpose(0, 1)
