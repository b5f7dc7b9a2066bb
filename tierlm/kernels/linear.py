"""Products with weights as they are stored: float32, bfloat16, float16, float8 with block scales, int8, int4.

Activations are float32, and so is the arithmetic; but products with int8 and int4 round the activations to int8 in
groups of 32, and add up whole numbers within a group, unless the weight is ``exact``. A few rows go to the compiled
kernels, which widen in registers; so do any number of rounded ones. For many in float32, on a CPU without 16-bit matrix
instructions, widening a tile that stays in cache and multiplying in float32 is several times faster than torch's
bfloat16 product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tierlm.kernels import native
from tierlm.kernels.quantised import dequantise, rounded
from tierlm.kernels.weight import BLOCK, LANES, Weight

TILE_VALUES = 2**20  # float32 values of one widened tile: 4 MiB
ROWS_AT_ONCE = 512  # of several experts in one call of the kernels
ABSORB_ROWS = 8  # rows up to which the kernels carry queries and values through kv_b without widening it

Job = tuple[Tensor, Tensor, tuple[Weight, Weight, Weight]]  # x, y, and gate, up and down of a gated_mlp


def widen(weight: Weight, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start`` to ``stop`` as float32 [stop - start, ...]; a view where they are float32 already."""
    if weight.scale is None:
        return weight.data[start:stop].float()  # torch does this as fast as anybody
    extra = start % (LANES if weight.quantised else BLOCK)  # begin where a tile, or a block of scales, does
    part = _rows(weight, weight.scale, start - extra, weight.shape[0] if stop is None else stop)
    kernels = native.kernels_for(part)
    return (kernels.widen(part) if kernels is not None else widen_reference(part))[extra:]


def widen_reference(weight: Weight) -> Tensor:
    """``widen`` of all rows of a scaled weight, in torch alone."""
    if weight.quantised:
        return dequantise(weight)
    assert weight.scale is not None
    wide = weight.scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return weight.data.float().mul_(wide[: weight.shape[0], : weight.shape[1]])


def _rows(weight: Weight, scale: Tensor, start: int, stop: int) -> Weight:
    """Rows of a scaled weight from ``start``, where a tile or a block of scales begins."""
    if not weight.quantised:
        return Weight(weight.data[start:stop], scale[start // BLOCK :])
    tiles = slice(start // LANES, -(-stop // LANES))
    return Weight(weight.data[tiles], scale[tiles], (stop - start, weight.shape[1]), weight.exact)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """``x @ weight.T``: float32 [T, in] -> float32 [T, out]. The result depends on the shapes and values alone."""
    kernels = native.kernels_for(weight)
    if kernels is not None and _few(x, weight):
        return kernels.linear(x, weight)
    return linear_reference(x, weight)


def _few(x: Tensor, weight: Weight) -> bool:
    """Whether the kernels are the faster way for these rows."""
    return (weight.rounds or x.shape[0] <= native.MAX_ROWS) and x.is_contiguous()


def linear_reference(x: Tensor, weight: Weight) -> Tensor:
    """``linear`` by matrix products of torch, a widened tile at a time."""
    if weight.rounds:
        x = rounded(x)
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


def gated_mlps(jobs: Sequence[Job]) -> None:
    """Several ``gated_mlp`` at once: (x, y, (gate, up, down)), where y, contiguous, is written.

    What each gives does not depend on the others.
    """
    library = native.load()
    together: list[Job] = []
    for x, y, weights in jobs:
        if library is not None and all(weight.plain and _few(x, weight) for weight in weights):
            together.append((x, y, weights))
        else:
            gate, up, down = weights
            y.copy_(linear(functional.silu(linear(x, gate)) * linear(x, up), down))
    if library is not None and together:
        for run in _runs(together):
            library.gated_mlps(run)


def _runs(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """The jobs in order, so many at a time that their scratch stays small."""
    first = rows = 0
    for at, (x, _, _) in enumerate(jobs):
        if at > first and rows + x.shape[0] > ROWS_AT_ONCE:
            yield jobs[first:at]
            first, rows = at, 0
        rows += x.shape[0]
    yield jobs[first:]


def can_absorb(kv_b: Weight, rows: int, nope: int, value: int) -> bool:
    """Whether ``into_latent`` and ``from_latent`` take this many rows through ``kv_b`` as it is stored."""
    whole = not kv_b.quantised or (nope % LANES == 0 and value % LANES == 0)  # no head begins within a tile
    return rows <= ABSORB_ROWS and whole and native.kernels_for(kv_b) is not None


def into_latent(q: Tensor, kv_b: Weight, first: int, heads: int) -> Tensor:
    """Queries carried into the latent space: float32 [T, g, nope] of the ``g`` heads from ``first`` on times the key
    half of kv_b, whose rows are [heads, nope + value] -> float32 [g, T, rank]. Never rounds them."""
    kernels, nope = native.kernels_for(kv_b), q.shape[2]
    if kernels is not None and can_absorb(kv_b, len(q), nope, kv_b.shape[0] // heads - nope) and q.stride(2) == 1:
        return kernels.into_latent(q, kv_b, first, heads)
    return torch.bmm(q.transpose(0, 1), _widen_heads(kv_b, first, q.shape[1], heads)[:, : q.shape[2]])


def from_latent(mixed: Tensor, kv_b: Weight, first: int, heads: int, value: int) -> Tensor:
    """Values out of the latent space: float32 [g, T, rank] of the ``g`` heads from ``first`` on times the value half
    of kv_b -> float32 [T, g, value]. Never rounds them."""
    kernels, rows = native.kernels_for(kv_b), mixed.shape[1]
    if kernels is not None and can_absorb(kv_b, rows, kv_b.shape[0] // heads - value, value) and mixed.is_contiguous():
        return kernels.from_latent(mixed, kv_b, first, heads, value)
    wide = _widen_heads(kv_b, first, len(mixed), heads)[:, -value:]
    return torch.bmm(mixed, wide.transpose(1, 2)).transpose(0, 1)


def _widen_heads(kv_b: Weight, first: int, count: int, heads: int) -> Tensor:
    """float32 [count, nope + value, rank]."""
    rows = kv_b.shape[0] // heads
    return widen(kv_b, first * rows, (first + count) * rows).view(count, rows, -1)
