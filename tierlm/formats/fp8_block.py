"""float8 with a float32 scale per 128 x 128 block (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tierlm.formats.format import Format, Part, Shape

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128  # rows and columns that share a scale


class Fp8Block(Format):
    """``NAME`` [out, in], and ``NAME_scale_inv`` [ceil(out / 128), ceil(in / 128)]: one factor per block."""

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        return {"": (self.dtype, shape), "_scale_inv": ("F32", tuple(-(-size // BLOCK) for size in shape))}

    def make(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Each block is scaled so that its largest value becomes the float8 maximum."""
        import torch

        outs, ins = matrix.shape
        padded = torch.nn.functional.pad(matrix, (0, -ins % BLOCK, 0, -outs % BLOCK))
        rows, columns = (size // BLOCK for size in padded.shape)
        blocks = padded.view(rows, BLOCK, columns, BLOCK)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        scale = torch.where(scale == 0, 1.0, scale)
        data = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        return data.view(padded.shape)[:outs, :ins].contiguous(), scale

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape) -> Tensor:
        assert scale is not None
        wide = scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
        return data.float().mul_(wide[: shape[0], : shape[1]])


FP8 = Fp8Block("fp8", (BLOCK, BLOCK), BLOCK * BLOCK + 4, "F8_E4M3", floats=True)
