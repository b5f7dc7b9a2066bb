"""Multi-head latent attention of a few tokens in one call of the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tierlm.kernels import native
from tierlm.kernels.linear import can_absorb
from tierlm.kernels.weight import VECTORS, Weight

CACHES = {torch.float32: 0, torch.bfloat16: 1}  # what a cache may hold, as product.h numbers it


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """What all layers share. ``interleaved``: whether the pairs that are rotated are neighbours. ``eps`` of the norms
    around attention and ``inner_eps`` of those inside; ``scale`` of the scores."""

    heads: int
    nope: int
    rope: int
    value: int
    interleaved: bool
    eps: float
    inner_eps: float
    scale: float


def fused_mla_decode(
    shape: LatentAttention,
    hidden: Tensor,
    matrices: Sequence[Weight | None],
    norms: Sequence[Weight | None],
    cache: Tensor,
    places: Tensor,
    angles: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor] | None:
    """The residual stream plus attention, and the norm of that, float32 [T, hidden] both, as models/attention.py has
    them; or None where there are no kernels for these weights, or they are not the faster way for as many tokens.

    ``hidden``: the residual stream. ``matrices``: q_a_proj (None where queries take one step), q_b_proj or q_proj,
    kv_a_proj, kv_b_proj, o_proj. ``norms``: before, of q_a (or None), of the latent, after. ``cache``: of this layer,
    float32 or bfloat16 [capacity, rank + rope], to which the latents are added. ``places``: int64 [T, 2], where in it a
    token's sequence begins, and the token's position there. ``angles``: cosine and sine, float32 [T, rope / 2].
    """
    library, kv_b = native.load(), matrices[3]
    if library is None or kv_b is None or not can_absorb(kv_b, hidden.shape[0], shape.nope, shape.value):
        return None
    known = all(weight is None or weight.plain for weight in matrices)
    if not known or not all(norm is None or norm.format in VECTORS for norm in norms):
        return None
    hidden = hidden.contiguous()
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    words: list[int] = []
    for weight in (*matrices, *norms):
        words += (0,) * 5 if weight is None else weight.operand
    words += (shape.heads, shape.nope, shape.rope, shape.value, shape.interleaved, CACHES[cache.dtype])
    words += [tensor.data_ptr() for tensor in (cache, places, *angles, hidden, total, normed)]
    library.attention([*words, hidden.shape[0]], shape.eps, shape.inner_eps, shape.scale)
    return total, normed
