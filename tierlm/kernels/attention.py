"""Multi-head latent attention for a few tokens, in one call of the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tierlm.kernels import native
from tierlm.kernels.linear import can_absorb
from tierlm.kernels.weight import ABSENT, VECTORS, Weight

CACHES = {torch.float32: 0, torch.bfloat16: 1}  # dtypes of a cache, numbered as in product.h


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Constants of all layers. ``interleaved``: rotated pairs are neighbours. ``eps``: for the norms around attention;
    ``inner_eps``: for the norms inside; ``scale``: of the scores."""

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
    """``Attention.forward`` of models/attention.py: the residual stream plus attention, and its norm, both float32
    [T, hidden]. None if no kernel supports these weights, or torch is faster for this many tokens.

    ``hidden``: the residual stream. ``matrices``: q_a_proj (None if queries have one projection), q_b_proj or q_proj,
    kv_a_proj, kv_b_proj and None or k_b_proj and v_b_proj, o_proj. ``norms``: input, q_a (or None), latent, output.
    ``cache``: this layer's, float32 or bfloat16 [capacity, rank + rope]; receives the new latents. ``places``: int64
    [T, 2], the cache row where each token's sequence begins, and the token's position in it. ``angles``: cosine and
    sine, float32 [T, rope / 2].
    """
    library, key_b, value_b = native.load(), matrices[3], matrices[4]
    if library is None or key_b is None:
        return None
    halves = [(key_b, shape.nope, shape.value)]
    if value_b is not None:
        halves = [(key_b, 0, key_b.shape[0] // shape.heads), (value_b, 0, shape.value)]
    if not all(can_absorb(weight, hidden.shape[0], keys, values) for weight, keys, values in halves):
        return None
    known = all(weight is None or weight.plain for weight in matrices)
    if not known or not all(norm is None or norm.format in VECTORS for norm in norms):
        return None
    hidden = hidden.contiguous()
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    words: list[int] = []
    for weight in (*matrices, *norms):
        words += ABSENT if weight is None else weight.operand
    words += (shape.heads, shape.nope, shape.rope, shape.value, shape.interleaved, CACHES[cache.dtype])
    words += [tensor.data_ptr() for tensor in (cache, places, *angles, hidden, total, normed)]
    library.attention([*words, hidden.shape[0]], shape.eps, shape.inner_eps, shape.scale)
    return total, normed
