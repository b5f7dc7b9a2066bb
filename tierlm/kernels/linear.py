"""Products with weights in their stored format.

Activations and arithmetic are float32. Exception: products with int8, int4 and the formats of GGUF (``Format.rounds``)
round activations to int8 in groups of 32 and sum integers within a group, unless the weight is ``exact``. The compiled
kernels take a few rows of float32 activations, or any number of rounded ones; with AVX-512 also any number of float32
ones for f32, bf16, f16 and fp8 in blocks. For more rows, one tile at a time is widened in cache and torch multiplies in
float32; on a CPU without 16-bit matrix instructions, this is several times faster than torch's bfloat16 product.
Formats without compiled kernels always use torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tierlm.formats import FORMATS
from tierlm.formats.tiles import LANES
from tierlm.kernels import native
from tierlm.kernels.quantised import rounded
from tierlm.kernels.weight import VECTORS, Weight

TILE_VALUES = 2**20  # float32 values of one widened tile: 4 MiB
TILE_ROWS = 128  # a tile has a multiple of this many rows, so that few blocks are widened twice
ROWS_AT_ONCE = 512  # activation rows of several experts in one call of the kernels
ABSORB_ROWS = 8  # most rows that the kernels multiply with kv_b without widening it

CLAMP, SLOPE = 7.0, 1.702  # of gpt-oss's experts

Job = tuple[Tensor, Tensor, tuple[Weight, Weight, Weight]]  # x, y, and gate, up and down of a gated_mlp


def widen(weight: Weight, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start`` to ``stop`` as float32 [stop - start, ...]; a view if the weight is float32."""
    extra = start % FORMATS[weight.format].block[0]
    part = weight.rows(start - extra, weight.shape[0] if stop is None else stop)
    kernels = native.kernels_for(part) if part.format not in VECTORS else None  # torch is as fast without scales
    return (kernels.widen(part) if kernels is not None else widen_reference(part))[extra:]


def widen_reference(weight: Weight) -> Tensor:
    """``widen`` of all rows in torch."""
    return FORMATS[weight.format].widen(weight.data, weight.scale, weight.shape, weight.extra)


def linear(x: Tensor, weight: Weight, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T``: float32 [T, in] -> float32 [T, out]. The result depends only on shapes and values.

    ``out``: written and returned if given; dense in its last dimension."""
    kernels = native.kernels_for(weight)
    if kernels is not None and _fast(kernels, x, weight):
        out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
        kernels.linear(x, weight, out)
        return out
    found = linear_reference(x, weight)
    return found if out is None else out.copy_(found)


def _fast(kernels: native.Native, x: Tensor, weight: Weight) -> bool:
    """Whether the kernels take these rows, and are faster."""
    return x.is_contiguous() and kernels.fast(weight, x.shape[0])


def linear_reference(x: Tensor, weight: Weight) -> Tensor:
    """``linear`` in torch, one widened tile at a time."""
    if weight.rounds:
        x = rounded(x)
    data = weight.data
    if weight.format in VECTORS and (data.dtype == x.dtype or x.device.type != "cpu"):
        return functional.linear(x.to(data.dtype), data).float()
    outs, ins = weight.shape
    tile = max(TILE_ROWS, TILE_VALUES // ins // TILE_ROWS * TILE_ROWS)
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


def transposed_linear(x: Tensor, weight: Weight) -> Tensor:
    """``x @ weight`` in torch, one widened tile at a time: float32 [T, in], [in, out] -> float32 [T, out]."""
    ins, outs = weight.shape
    tile = max(TILE_ROWS, TILE_VALUES // outs // TILE_ROWS * TILE_ROWS)
    out = x.new_zeros(x.shape[0], outs)
    for start in range(0, ins, tile):
        out.addmm_(x[:, start : start + tile], widen(weight, start, start + tile))
    return out


def glu_mlp(x: Tensor, weights: Mapping[str, Weight], gelu: bool, transposed: bool = False) -> Tensor:
    """SwiGLU, or with ``gelu`` GeGLU in its tanh approximation: float32 [T, in] -> float32 [T, in].

    ``weights``: NAME_proj of gate and up, or of gate_up, whose first half is the gate; and of down. ``transposed``:
    matrices are [in, out]."""
    multiply = transposed_linear if transposed else linear
    if "gate_up_proj" in weights:
        gate, up = multiply(x, weights["gate_up_proj"]).chunk(2, dim=-1)
    else:
        gate, up = multiply(x, weights["gate_proj"]), multiply(x, weights["up_proj"])
    gate = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
    return multiply(gate * up, weights["down_proj"])


def clamped_mlp(x: Tensor, weights: Mapping[str, Weight], transposed: bool = False) -> Tensor:
    """gpt-oss's expert, after `GptOssExperts` in transformers: float32 [T, in] -> float32 [T, in].

    ``weights``: NAME_proj and NAME_bias of gate and up, or of gate_up, whose rows alternate; and of down.
    ``transposed``: matrices are [in, out]."""

    def product(x: Tensor, name: str) -> Tensor:
        multiply = transposed_linear if transposed else linear
        return multiply(x, weights[f"{name}_proj"]).add_(weights[f"{name}_bias"].data.float())

    if "gate_up_proj" in weights:
        both = product(x, "gate_up")
        gate, up = both[:, ::2], both[:, 1::2]
    else:
        gate, up = product(x, "gate"), product(x, "up")
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    return product(gate * torch.sigmoid(SLOPE * gate) * (up + 1), "down")


def gated_mlps(jobs: Sequence[Job]) -> None:
    """Several ``gated_mlp`` at once: (x, y, (gate, up, down)) each. Writes the contiguous y.

    Each result is independent of the other jobs.
    """
    library = native.load()
    together: list[Job] = []
    for x, y, weights in jobs:
        if library is not None and all(weight.plain and _fast(library, x, weight) for weight in weights):
            together.append((x, y, weights))
        else:
            gate, up, down = weights
            y.copy_(linear(functional.silu(linear(x, gate)) * linear(x, up), down))
    if library is not None and together:
        for run in _runs(together):
            library.gated_mlps(run)


def _runs(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """The jobs in order, split so that scratch memory stays small."""
    first = rows = 0
    for at, (x, _, _) in enumerate(jobs):
        if at > first and rows + x.shape[0] > ROWS_AT_ONCE:
            yield jobs[first:at]
            first, rows = at, 0
        rows += x.shape[0]
    yield jobs[first:]


def can_absorb(kv_b: Weight, rows: int, nope: int, value: int) -> bool:
    """Whether ``into_latent`` and ``from_latent`` multiply this many rows with ``kv_b`` in its stored format."""
    whole = not kv_b.tiled or (nope % LANES == 0 and value % LANES == 0)  # heads begin at tile boundaries
    return rows <= ABSORB_ROWS and whole and native.kernels_for(kv_b) is not None


def into_latent(q: Tensor, kv_b: Weight, first: int, heads: int) -> Tensor:
    """Queries into the latent space: float32 [T, g, nope] of the ``g`` heads starting at ``first``, times the key half
    of kv_b [heads * (nope + value), rank] -> float32 [g, T, rank]. Never rounds queries."""
    kernels, nope = native.kernels_for(kv_b), q.shape[2]
    if kernels is not None and can_absorb(kv_b, len(q), nope, kv_b.shape[0] // heads - nope) and q.stride(2) == 1:
        return kernels.into_latent(q, kv_b, first, heads)
    return torch.bmm(q.transpose(0, 1), _widen_heads(kv_b, first, q.shape[1], heads)[:, :nope])


def from_latent(mixed: Tensor, kv_b: Weight, first: int, heads: int, value: int) -> Tensor:
    """Values out of the latent space: float32 [g, T, rank] of the ``g`` heads starting at ``first``, times the value
    half of kv_b -> float32 [T, g, value]. Never rounds ``mixed``."""
    kernels, rows = native.kernels_for(kv_b), mixed.shape[1]
    if kernels is not None and can_absorb(kv_b, rows, kv_b.shape[0] // heads - value, value) and mixed.is_contiguous():
        return kernels.from_latent(mixed, kv_b, first, heads, value)
    wide = _widen_heads(kv_b, first, len(mixed), heads)[:, -value:]
    return torch.bmm(mixed, wide.transpose(1, 2)).transpose(0, 1)


def _widen_heads(kv_b: Weight, first: int, count: int, heads: int) -> Tensor:
    """float32 [count, nope + value, rank]."""
    rows = kv_b.shape[0] // heads
    return widen(kv_b, first * rows, (first + count) * rows).view(count, rows, -1)
