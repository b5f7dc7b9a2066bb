"""Attention of many new tokens to all tokens of their sequence, in the compiled kernels.

The scores never exist as a matrix (FlashAttention, arXiv 2205.14135). With a bfloat16 cache, processors with AVX-512
BF16 round queries, weights, and expanded keys and values to bfloat16, and sum in float32.
"""

from __future__ import annotations

from torch import Tensor

from tierlm.kernels import native
from tierlm.kernels.attention import CACHES


def attend_chunk(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None = None, sinks: Tensor | None = None
) -> Tensor | None:
    """Softmax attention: float32 ``queries`` [T, heads, dim] of the last T of S tokens with their cached ``keys``
    [S, kv_heads, dim] and ``values`` [S, kv_heads, value] -> float32 [T, heads, value]. None without compiled kernels.

    Keys and values are views of one cache, float32 or bfloat16: dense in their last dimension, equally strided in the
    first. ``window``: tokens that a query sees, up to its own. ``sinks``: float32 [heads], one more logit in each sum.
    """
    library = native.load()
    if library is None or queries.device.type != "cpu":
        return None
    (tokens, heads, dim), (past, groups, value) = queries.shape, values.shape
    sharing = heads // groups
    by_group = queries.reshape(tokens, groups, sharing, dim).transpose(0, 1).contiguous()
    out = queries.new_empty(groups, tokens, sharing, value)
    extra = None if sinks is None else sinks.float().contiguous()
    item = keys.element_size()
    words = (
        *(part.data_ptr() for part in (by_group, keys, values)),
        *(0 if extra is None else extra.data_ptr(), out.data_ptr(), CACHES[keys.dtype]),
        *(keys.stride(0) * item, keys.stride(1) * item, values.stride(1) * item),
        *(groups, sharing, dim, value, past - tokens, tokens, window or 0),
    )
    library.chunk(words, scale)
    return out.transpose(0, 1).reshape(tokens, heads, value)


def attend_latents(
    queries: Tensor, to_keys: Tensor, to_values: Tensor, latents: Tensor, scale: float, out: Tensor
) -> bool:
    """Causal attention with keys and values that each head expands from the cached ``latents`` [S, rank + rope],
    float32 or bfloat16: float32 ``queries`` [T, g, nope + rope] of the last T of S tokens -> ``out`` [T, g, value], a
    view of some heads' outputs. ``to_keys`` and ``to_values``: float32 [g, rank, nope] and [g, rank, value], of any
    strides. False without compiled kernels.
    """
    library = native.load()
    if library is None or queries.device.type != "cpu":
        return False
    queries = queries.contiguous()
    (tokens, heads, width), (_, rank, nope), value = queries.shape, to_keys.shape, to_values.shape[2]
    words = (
        *(part.data_ptr() for part in (queries, to_keys, to_values)),
        *(part.stride(i) for part in (to_keys, to_values) for i in (0, 2, 1)),
        *(latents.data_ptr(), out.data_ptr(), CACHES[latents.dtype], heads, out.stride(0) // value),
        *(nope, width - nope, rank, value, len(latents) - tokens, tokens),
    )
    library.latent_chunk(words, scale)
    return True
