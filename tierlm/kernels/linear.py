"""Products with weights as they are stored: float32, bfloat16, float16, or float8 with block scales.

Activations are float32, and so is the arithmetic. A few rows go to the compiled kernels, which widen in registers. For
many, on a CPU without 16-bit matrix instructions, widening a tile that stays in cache and multiplying in float32 is
several times faster than torch's bfloat16 product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tierlm.kernels import native
from tierlm.kernels.weight import BLOCK, Weight

TILE_VALUES = 2**20  # float32 values of one widened tile: 4 MiB
ABSORB_ROWS = 8  # rows up to which the kernels carry queries and values through kv_b without widening it


def widen(weight: Weight, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start`` to ``stop`` as float32 [stop - start, ...]; a view where they are float32 already."""
    if weight.scale is None:
        return weight.data[start:stop].float()  # torch does this as fast as anybody
    extra = start % BLOCK  # begin where a block of scales does
    data, scale = weight.data[start - extra : stop], weight.scale[start // BLOCK :]
    kernels = native.kernels_for(data, scale)
    wide = kernels.widen(data, scale) if kernels is not None else widen_reference(data, scale)
    return wide[extra:]


def widen_reference(data: Tensor, scale: Tensor) -> Tensor:
    """``widen`` of all rows of a scaled weight, in torch alone."""
    wide = scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return data.float().mul_(wide[: data.shape[0], : data.shape[1]])


def linear(x: Tensor, weight: Weight) -> Tensor:
    """``x @ weight.T``: float32 [T, in] -> float32 [T, out]. The result depends on the shapes and values alone."""
    kernels = native.kernels_for(weight.data, weight.scale)
    if kernels is not None and len(x) <= native.MAX_ROWS and x.is_contiguous():
        return kernels.linear(x, weight.data, weight.scale)
    return linear_reference(x, weight)


def linear_reference(x: Tensor, weight: Weight) -> Tensor:
    """``linear`` by matrix products of torch, a widened tile at a time."""
    if weight.scale is None and weight.data.dtype == x.dtype:
        return functional.linear(x, weight.data)
    if x.device.type != "cpu" and weight.scale is None:
        return functional.linear(x.to(weight.data.dtype), weight.data).float()
    outs, ins = weight.shape
    tile = max(BLOCK, TILE_VALUES // ins // BLOCK * BLOCK)
    out = x.new_empty(x.shape[0], outs)
    for start in range(0, outs, tile):
        stop = min(start + tile, outs)
        torch.mm(x, widen(weight, start, stop).t(), out=out[:, start:stop])
    return out


def gated_mlp(x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    """SwiGLU: ``down(silu(gate(x)) * up(x))``. float32 [T, in] -> float32 [T, in]."""
    out = torch.empty_like(x)
    gated_mlps([(x, out, (gate, up, down))])
    return out


def gated_mlps(jobs: Sequence[tuple[Tensor, Tensor, tuple[Weight, Weight, Weight]]]) -> None:
    """Several ``gated_mlp`` of one shape at once: (x, y, (gate, up, down)), where y, contiguous, is written.

    What each gives does not depend on the others.
    """
    together: dict[torch.dtype, list[tuple[Tensor, Tensor, list[tuple[Tensor, Tensor | None]]]]] = {}
    for x, y, weights in jobs:
        kernels = [native.kernels_for(weight.data, weight.scale) for weight in weights]
        alike = len({weight.data.dtype for weight in weights}) == 1
        if alike and all(kernels) and len(x) <= native.MAX_ROWS and x.is_contiguous():
            together.setdefault(weights[0].data.dtype, []).append((x, y, [(w.data, w.scale) for w in weights]))
        else:
            gate, up, down = weights
            y.copy_(linear(functional.silu(linear(x, gate)) * linear(x, up), down))
    library = native.load()
    if library is not None:
        for few in together.values():
            library.gated_mlps(few)


def unwidened(kv_b: Weight, rows: int) -> bool:
    """Whether ``into_latent`` and ``from_latent`` take this many rows through ``kv_b`` as it is stored."""
    return rows <= ABSORB_ROWS and native.kernels_for(kv_b.data, kv_b.scale) is not None


def into_latent(q: Tensor, kv_b: Weight, first: int, heads: int) -> Tensor:
    """Queries carried into the latent space: float32 [T, g, nope] of the ``g`` heads from ``first`` on times the key
    half of kv_b, whose rows are [heads, nope + value] -> float32 [g, T, rank]."""
    kernels = native.kernels_for(kv_b.data, kv_b.scale)
    if kernels is not None and len(q) <= ABSORB_ROWS and q.stride(2) == 1:
        return kernels.into_latent(q, kv_b.data, kv_b.scale, first, heads)
    return torch.bmm(q.transpose(0, 1), _widen_heads(kv_b, first, q.shape[1], heads)[:, : q.shape[2]])


def from_latent(mixed: Tensor, kv_b: Weight, first: int, heads: int, value: int) -> Tensor:
    """Values out of the latent space: float32 [g, T, rank] of the ``g`` heads from ``first`` on times the value half
    of kv_b -> float32 [T, g, value]."""
    kernels = native.kernels_for(kv_b.data, kv_b.scale)
    if kernels is not None and mixed.shape[1] <= ABSORB_ROWS and mixed.is_contiguous():
        return kernels.from_latent(mixed, kv_b.data, kv_b.scale, first, heads, value)
    wide = _widen_heads(kv_b, first, len(mixed), heads)[:, -value:]
    return torch.bmm(mixed, wide.transpose(1, 2)).transpose(0, 1)


def _widen_heads(kv_b: Weight, first: int, count: int, heads: int) -> Tensor:
    """float32 [count, nope + value, rank]."""
    rows = kv_b.shape[0] // heads
    return widen(kv_b, first * rows, (first + count) * rows).view(count, rows, -1)
