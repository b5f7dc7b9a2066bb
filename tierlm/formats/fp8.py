"""float8 with scales: of 128 x 128 blocks (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2), of rows, or
of the whole weight. Activations are not rounded to float8, whatever a checkpoint says of them (``input_scale``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierlm.formats.format import Format, Part, Shape

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128  # rows and columns that share a scale


@dataclass(frozen=True, kw_only=True)
class Fp8Block(Format):
    """``NAME`` [out, in], and with the suffix ``scale`` [ceil(out / 128), ceil(in / 128)]: one factor per block."""

    scale: str

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        return {"": (self.dtype, shape), self.scale: ("F32", tuple(-(-size // BLOCK) for size in shape))}

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

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        assert scale is not None
        wide = scale.float().repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
        return data.float().mul_(wide[: shape[0], : shape[1]])


class Fp8Rows(Format):
    """``NAME`` [out, in], and ``NAME_scale`` [out, 1]: one factor per row, not counted in ``bits``."""

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        return {"": (self.dtype, shape), "_scale": ("F32", (shape[0], 1))}

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        assert scale is not None
        return data.float().mul_(scale.float())


class Fp8Whole(Format):
    """``NAME`` [out, in], and the factor of all values."""

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        return {"": (self.dtype, shape), self.extra: ("F32", ())}

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        assert extra is not None
        return data.float().mul_(extra.float())


FP8 = Fp8Block("fp8", (BLOCK, BLOCK), BLOCK * BLOCK + 4, "F8_E4M3", floats=True, packable=True, scale="_scale_inv")
OTHER_FP8 = (
    Fp8Block("fp8_blocks", (BLOCK, BLOCK), BLOCK * BLOCK + 4, "F8_E4M3", floats=True, scale="_scale"),
    Fp8Rows("fp8_rows", (1, 1), 1, "F8_E4M3", floats=True),
    Fp8Whole("fp8_whole", (1, 1), 1, "F8_E4M3", floats=True, extra="_scale"),
    Fp8Whole("fp8_inverse", (1, 1), 1, "F8_E4M3", floats=True, extra="_scale_inv"),
)
