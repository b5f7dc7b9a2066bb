"""int8 and int4: integers in tiles, with a float16 scale for each row of a tile.

A weight [out, in] is cut into tiles of 8 rows x 32 columns, zero-padded at the edges. With O = ceil(out / 8) and
G = ceil(in / 32):

    int8   data  int8    [O, G, 256]   byte 32 q + 4 r + j of a tile: row r, column 4 q + j          (q < 8, j < 4)
    int4   data  uint8   [O, G, 128]   byte 32 v + 4 r + j: row r, column 4 v + j in the low four bits,
                                       column 16 + 4 v + j in the high four                          (v < 4, j < 4)
    both   scale float16 [O, G, 8]     one for each row of a tile

A value is scale x stored number (int8) or scale x (stored number - 8) (int4). int8 numbers are -127 to 127. A scale may
be negative; padding rows have scale 0. The 8 rows of a tile are the 8 lanes of a vector: one instruction multiplies
four columns of each row by four activations shared by all lanes, and one vector holds the tile's scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tierlm.formats.format import Format, Part, Shape

if TYPE_CHECKING:
    from torch import Tensor

LANES = 8  # rows of a tile, one per vector lane
GROUP = 32  # columns of a tile; they share one scale in each row
# Candidate int4 scales, given as the unrounded number of a group's largest value. Clipping that value may be worth a
# finer scale for the others.
PEAKS = tuple(-6 - step / 4 for step in range(13))


class Tiles(Format):
    """``NAME`` holds the tiles, ``NAME_scale`` their scales."""

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        tiles = -(-shape[0] // LANES), -(-shape[1] // GROUP)
        return {"": (self.dtype, (*tiles, self.block_bytes - 2 * LANES)), "_scale": ("F16", (*tiles, LANES))}

    def make(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Needs about 20 times the size of ``matrix`` in bf16."""
        from torch.nn import functional

        padded = functional.pad(matrix, (0, -matrix.shape[1] % GROUP, 0, -matrix.shape[0] % LANES))
        scale, numbers = self._numbers(padded.view(len(padded), -1, GROUP))
        tiles = numbers.view(len(padded) // LANES, LANES, -1, GROUP).transpose(1, 2).contiguous()  # [O, G, 8, 32]
        tiles = tiles.view(*tiles.shape[:3], -1, 4).transpose(2, 3).contiguous()  # [O, G, 8 quads, 8 rows, 4]
        scales = scale.view(len(tiles), LANES, -1).transpose(1, 2).contiguous()
        return self._packed(tiles).flatten(2), scales

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        assert scale is not None
        tiles = self._unpacked(data)
        blocks, groups = tiles.shape[:2]
        values = tiles.reshape(blocks, groups, -1, LANES, 4).transpose(2, 3).reshape(blocks, groups, LANES, GROUP)
        wide = (values.float() * scale.float()[..., None]).transpose(1, 2).reshape(blocks * LANES, -1)
        return wide[: shape[0], : shape[1]].contiguous()

    def _numbers(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [..., 32] -> scales float16 [...], numbers int8 [..., 32]. The largest magnitude maps to 127."""
        import torch

        scale = _half(groups.abs().amax(-1) / 127)
        return scale, _nearest(groups, scale, -127, 127).to(torch.int8)

    def _packed(self, tiles: Tensor) -> Tensor:
        """Stored bytes of numbers, int8 [O, G, 8 quads, 8 rows, 4]."""
        return tiles

    def _unpacked(self, data: Tensor) -> Tensor:
        return data


class Int4Tiles(Tiles):
    """Two numbers per byte."""

    def _numbers(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """As in ``Tiles``, but numbers are 0 to 15 and scales are searched for the least squared error."""
        import torch

        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        best = torch.full_like(largest, torch.inf)
        scale = torch.zeros_like(largest, dtype=torch.float16)
        for peak in PEAKS:
            numbers = _nearest(groups, _half(largest / peak), -8, 7)
            # The least-squares scale for these numbers.
            tried = _half((groups * numbers).sum(-1) / (numbers * numbers).sum(-1).clamp_(min=1))
            error = (groups - tried.float()[..., None] * _nearest(groups, tried, -8, 7)).pow_(2).sum(-1)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        return scale, (_nearest(groups, scale, -8, 7) + 8).to(torch.int8)

    def _packed(self, tiles: Tensor) -> Tensor:
        import torch

        tiles = tiles.to(torch.uint8)
        return tiles[:, :, :4] | tiles[:, :, 4:] << 4

    def _unpacked(self, data: Tensor) -> Tensor:
        import torch

        return torch.stack((data & 15, data >> 4), dim=2).to(torch.int8) - 8  # [O, G, 2, 128]


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(-65504, 65504).half()


def _nearest(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The integers nearest to ``groups / scale``, clamped to ``low`` .. ``high``; 0 where the scale is 0."""
    import torch

    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    return (groups * inverse[..., None]).round_().clamp_(low, high)


INT8 = Tiles("int8", (LANES, GROUP), LANES * (GROUP + 2), "I8", rounds=True, packable=True)
INT4 = Int4Tiles("int4", (LANES, GROUP), LANES * (GROUP // 2 + 2), "U8", rounds=True, packable=True)
