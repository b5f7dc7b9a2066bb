"""int8 and int4 weights: their layout, how they are made, and what they stand for.

A weight [out, in] is cut into tiles of 8 rows x 32 columns, the edges padded with zeros. With O = ceil(out / 8) and
G = ceil(in / 32):

    int8   data  int8    [O, G, 256]   byte 32 q + 4 r + j of a tile: row r, column 4 q + j          (q < 8, j < 4)
    int4   data  uint8   [O, G, 128]   byte 32 v + 4 r + j: row r, column 4 v + j in the low four bits,
                                       column 16 + 4 v + j in the high four                          (v < 4, j < 4)
    both   scale float16 [O, G, 8]     of the 8 rows of a tile

A value is scale x (stored number), less 8 first where it is int4. int8 uses -127 to 127. A scale may be negative; the
scales of rows that are padding are 0. So the 8 rows are 8 lanes of a vector: four columns of each are multiplied at
once by four activations that all lanes share, and one vector of scales serves a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tierlm.kernels import native
from tierlm.kernels.weight import GROUP, LANES, Weight

TILE_BYTES = {"int8": 256, "int4": 128}
# Scales that are tried for a group of int4, as the number that its largest value is mapped to, before rounding. The
# rest of a group may gain more by a finer scale than its largest value loses.
LEVELS = tuple(-6 - step / 4 for step in range(13))
NEGLIGIBLE = 1e-30  # a group of activations with nothing larger is taken for zeros


def layout(format: str, outs: int, ins: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes of data and scale of an int8 or int4 weight [outs, ins]."""
    blocks, groups = -(-outs // LANES), -(-ins // GROUP)
    return (blocks, groups, TILE_BYTES[format]), (blocks, groups, LANES)


def quantise(weight: Tensor, format: str) -> Weight:
    """The int8 or int4 weight nearest to a finite float ``weight`` [out, in]; scales are searched for least squared
    error in int4, and take the largest value of a group to 127 in int8. Slices of rows, a multiple of 8 each, give the
    same tiles."""
    library = native.load()
    if library is None or weight.device.type != "cpu":
        return quantise_reference(weight, format)
    data, scale = layout(format, *weight.shape)
    dtype = torch.int8 if format == "int8" else torch.uint8
    made = Weight(
        torch.empty(data, dtype=dtype), torch.empty(scale, dtype=torch.float16), (weight.shape[0], weight.shape[1])
    )
    library.quantise(weight.float().contiguous(), made)
    return made


def quantise_reference(weight: Tensor, format: str) -> Weight:
    """``quantise`` in torch alone; it needs about 20 times the bytes that ``weight`` has in bf16."""
    outs, ins = weight.shape
    padded = functional.pad(weight.float(), (0, -ins % GROUP, 0, -outs % LANES))
    groups = padded.view(len(padded), -1, GROUP)
    scale, numbers = _int8(groups) if format == "int8" else _int4(groups)
    tiles = numbers.view(len(padded) // LANES, LANES, -1, GROUP).transpose(1, 2).contiguous()  # [O, G, 8, 32]
    tiles = tiles.view(*tiles.shape[:3], -1, 4).transpose(2, 3).contiguous()  # [O, G, 8 quads, 8 rows, 4]
    if format == "int4":
        tiles = tiles.to(torch.uint8)
        tiles = tiles[:, :, :4] | tiles[:, :, 4:] << 4
    scales = scale.view(len(tiles), LANES, -1).transpose(1, 2).contiguous()
    return Weight(tiles.flatten(2), scales, (outs, ins))


def dequantise(weight: Weight) -> Tensor:
    """What an int8 or int4 weight stands for: float32 [out, in]."""
    assert weight.scale is not None
    tiles = weight.data
    if weight.format == "int4":
        tiles = torch.stack((tiles & 15, tiles >> 4), dim=2).to(torch.int8) - 8  # [O, G, 2, 128]
    blocks, groups = tiles.shape[:2]
    values = tiles.reshape(blocks, groups, -1, LANES, 4).transpose(2, 3).reshape(blocks, groups, LANES, GROUP)
    wide = (values.float() * weight.scale.float()[..., None]).transpose(1, 2).reshape(blocks * LANES, -1)
    return wide[: weight.shape[0], : weight.shape[1]].contiguous()


def rounded(x: Tensor) -> Tensor:
    """Activations as products with int8 and int4 take them, float32 [T, in] both: in groups of 32 columns the nearest
    multiples of 1 / 127 of the largest; halves go to the even one. Not a number where a group has no finite largest."""
    groups = functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest <= NEGLIGIBLE, 0.0, torch.full_like(largest, 127).div_(largest))
    numbers = (groups * inverse).round_()
    return (numbers * (largest / 127)).flatten(1)[:, : x.shape[1]]


def _int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., 32] -> scales float16 [...], numbers int8 [..., 32]."""
    scale = _half(groups.abs().amax(-1) / 127)
    return scale, _nearest(groups, scale, -127, 127).to(torch.int8)


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..., 32] -> scales float16 [...], numbers 0 to 15 as int8 [..., 32]."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    best = torch.full_like(largest, torch.inf)
    scale = torch.zeros_like(largest, dtype=torch.float16)
    for level in LEVELS:
        tried = _half(largest / level)
        numbers = _nearest(groups, tried, -8, 7)
        # With the numbers fixed, the scale of least squared error.
        tried = _half((groups * numbers).sum(-1) / (numbers * numbers).sum(-1).clamp_(min=1))
        error = (groups - tried.float()[..., None] * _nearest(groups, tried, -8, 7)).pow_(2).sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    return scale, (_nearest(groups, scale, -8, 7) + 8).to(torch.int8)


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(-65504, 65504).half()


def _nearest(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The whole numbers whose products with ``scale`` are nearest; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    return (groups * inverse[..., None]).round_().clamp_(low, high)
