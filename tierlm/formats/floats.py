"""Unscaled floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tierlm.formats.dtypes import torch_dtypes
from tierlm.formats.format import Format, Part, Shape

if TYPE_CHECKING:
    from torch import Tensor


class Floats(Format):
    """Floats of one dtype."""

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        return {"": (self.dtype, shape)}

    def make(self, matrix: Tensor) -> tuple[Tensor, None]:
        return matrix.to(torch_dtypes()[self.dtype]), None

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        """Returns ``data`` itself if it is float32."""
        return data.float()


F32 = Floats("f32", (1, 1), 4, "F32", matrices_only=False, floats=True, packable=True)
BF16 = Floats("bf16", (1, 1), 2, "BF16", matrices_only=False, floats=True, packable=True)
F16 = Floats("f16", (1, 1), 2, "F16", matrices_only=False, floats=True, packable=True)
