"""Grouped-query attention (Ainslie et al., arXiv 2305.13245), with optional RMSNorm of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tierlm.attention_spec import SCORE_VALUES, Grouped
from tierlm.checkpoints.views import Weights
from tierlm.kernels import GroupedAttention, Weight, attend_chunk, fused_gqa_decode, linear
from tierlm.memory.kvcache import KvCache
from tierlm.models.attention import Positions, Rotary, Rows, causal_softmax
from tierlm.models.layers import rms_norm, rotate, softmax_scale

# What the kernel computes of a spec. Torch computes layers with anything else.
FUSED: tuple[str, ...] = ("heads", "kv_heads", "head_dim", "rope", "rope_dim", "qk_norm")
FUSED += ("bias", "output_bias", "sinks", "window", "scalar")


class GroupedHeads:
    """``Attention`` for layers with this ``spec``; ``norm_eps`` and ``zero_centred`` apply to all norms."""

    def __init__(
        self, spec: Grouped, norm_eps: float, cache: KvCache, device: torch.device, zero_centred: bool = False
    ):
        self.spec, self.norm_eps, self.cache = spec, norm_eps, cache
        self._normed = partial(rms_norm, eps=norm_eps, zero_centred=zero_centred)
        self._rotary = Rotary(spec.rope, spec.rotated, device)
        self._scale = softmax_scale(spec.rope, spec.scalar or spec.head_dim)
        self._sharing = spec.heads // spec.kv_heads  # query heads per head of keys and values
        dims = spec.heads, spec.kv_heads, spec.head_dim, spec.rotated
        rules = spec.rope.interleaved, spec.qk_norm == "all", zero_centred, spec.window or 0
        self._shape = GroupedAttention(*dims, *rules, norm_eps, self._scale)
        self._fused = spec == Grouped(**{name: getattr(spec, name) for name in FUSED})

    def positions(self, segments: Sequence[Rows]) -> Positions:
        return self._rotary.positions(segments)

    def forward(
        self, hidden: Tensor, layer: int, trunk: Weights, next_norm: Weight, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Few tokens: one kernel call if possible. Else part by part, with one kernel call for the attention of a
        sequence; in torch, query heads that share keys and values are multiplied with them in one product."""
        done = None
        if self._fused:
            where = self.cache.layer(layer), positions.places, positions.angles
            done = fused_gqa_decode(self._shape, hidden, trunk, next_norm, *where)
        return self._in_parts(hidden, layer, trunk, next_norm, positions) if done is None else done

    def _in_parts(
        self, hidden: Tensor, layer: int, trunk: Weights, next_norm: Weight, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        spec, tokens = self.spec, len(hidden)
        x = self._normed(hidden, trunk["input_layernorm"])
        queries, gates = _projected(x, trunk, "q"), None
        if spec.gated:
            queries, gates = queries.view(tokens, spec.heads, 2, -1).unbind(2)  # [T, heads, dim] both
            queries = queries.flatten(1)
        queries = self._rotated(queries, trunk.get("q_norm"), positions)  # [T, heads, dim]
        plain = _projected(x, trunk, "k")
        keys = self._rotated(plain, trunk.get("k_norm"), positions)  # [T, kv_heads, dim]
        values = plain if spec.keys_as_values else _projected(x, trunk, "v")
        if spec.value_norm:
            values = rms_norm(values.view_as(keys), None, self.norm_eps).flatten(1)
        step = torch.cat((keys.flatten(1), values), dim=-1)  # [T, 2 * kv_heads * dim]
        sinks = trunk["sinks"].data.float() if spec.sinks else None
        out = torch.empty_like(queries)
        for segment in positions.segments:
            rows = slice(segment.start, segment.stop)
            past = self.cache.append(layer, segment.span, step[rows])  # [S, 2 * kv_heads * dim]
            if spec.window is not None:  # what the first query sees, and on
                past = past[-(spec.window + segment.stop - segment.start - 1) :]
            keys, values = past.view(len(past), 2, spec.kv_heads, spec.head_dim).unbind(1)
            found = attend_chunk(queries[rows], keys, values, self._scale, spec.window, sinks)
            if found is None:
                self._attend(queries[rows], past.float(), sinks, out[rows])
            else:
                out[rows] = found
        if gates is not None:
            out *= gates.sigmoid()
        added = _projected(out.view(tokens, spec.query_width), trunk, "o")
        if (norm := trunk.get("attention_norm")) is not None:
            added = self._normed(added, norm)
        total = hidden + added
        return total, self._normed(total, next_norm)

    def _rotated(self, x: Tensor, norm: Weight | None, positions: Positions) -> Tensor:
        """Queries or keys [T, heads * dim], normed and rotated -> [T, heads, dim]."""
        spec = self.spec
        if norm is not None and spec.qk_norm == "all":
            x = self._normed(x, norm)
        x = x.view(len(x), -1, spec.head_dim)
        if norm is not None and spec.qk_norm == "head":
            x = self._normed(x, norm)
        turned = rotate(x[..., : spec.rotated], *positions.angles, spec.rope.interleaved)
        return turned if spec.rotated == spec.head_dim else torch.cat((turned, x[..., spec.rotated :]), dim=-1)

    def _attend(self, queries: Tensor, past: Tensor, sinks: Tensor | None, out: Tensor) -> None:
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
            extra = None if sinks is None else sinks[mine]
            shares = causal_softmax(scores, self._scale, spec.window, extra).view(-1, together * tokens, len(past))
            out[:, mine] = torch.bmm(shares, values[own]).view(count, tokens, dim).transpose(0, 1)


def _projected(x: Tensor, trunk: Weights, name: str) -> Tensor:
    """The projection ``name`` of ``x``, with its bias if it has one."""
    found, bias = linear(x, trunk[f"{name}_proj"]), trunk.get(f"{name}_bias")
    return found if bias is None else found.add_(bias.data.float())
