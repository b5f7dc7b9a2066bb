"""Grouped-query attention for a few tokens, in one call of the compiled kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tierlm.kernels import native
from tierlm.kernels.attention import CACHES
from tierlm.kernels.weight import ABSENT, VECTORS, Weight

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("input_layernorm", "q_norm", "k_norm", "attention_norm")
BIASES = ("q_bias", "k_bias", "v_bias", "o_bias", "sinks")


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """Constants of all layers. ``rotated``: dimensions of a head, its first. ``interleaved``: rotated pairs are
    neighbours. ``whole_norm``: queries and keys are normed over all heads together. ``zero_centred``: norms are stored
    less one. ``window``: tokens that a query sees; 0: all. ``eps``: for all norms; ``scale``: of the scores."""

    heads: int
    kv_heads: int
    dim: int
    rotated: int
    interleaved: bool
    whole_norm: bool
    zero_centred: bool
    window: int
    eps: float
    scale: float


def fused_gqa_decode(
    shape: GroupedAttention,
    hidden: Tensor,
    trunk: Mapping[str, Weight],
    next_norm: Weight,
    cache: Tensor,
    places: Tensor,
    angles: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor] | None:
    """``Attention.forward`` of models/attention.py: the residual stream plus attention, and its norm, both float32
    [T, hidden]. None if no kernel supports these weights, or torch is faster for this many tokens.

    ``hidden``: the residual stream. ``trunk``: the layer's weights by role, as in models/family.py. ``next_norm``: the
    norm after attention. ``cache``: this layer's, float32 or bfloat16 [capacity, 2 * kv_heads * dim]; receives the new
    keys and values. ``places``: int64 [T, 2], the cache row where each token's sequence begins, and the token's
    position in it. ``angles``: cosine and sine, float32 [T, rotated / 2].
    """
    library = native.load()
    if library is None or len(hidden) > native.MAX_ROWS:
        return None
    matrices = [trunk[name] for name in MATRICES]
    vectors = [trunk.get(name) for name in NORMS] + [next_norm] + [trunk.get(name) for name in BIASES]
    if not all(weight.plain for weight in matrices) or any(v is not None and v.format not in VECTORS for v in vectors):
        return None
    hidden = hidden.contiguous()
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    words: list[int] = []
    for weight in (*matrices, *vectors):
        words += ABSENT if weight is None else weight.operand
    words += (shape.heads, shape.kv_heads, shape.dim, shape.rotated, shape.interleaved, shape.whole_norm)
    words += (shape.zero_centred, shape.window, CACHES[cache.dtype])
    words += [tensor.data_ptr() for tensor in (cache, places, *angles, hidden, total, normed)]
    library.grouped_attention([*words, hidden.shape[0]], shape.eps, shape.scale)
    return total, normed
