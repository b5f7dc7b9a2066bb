"""Layouts: which tensors of a file make up one matrix. What they stand for is in formats.py. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tierlm.checkpoints.checkpoint import TensorInfo

SCALE_BLOCK = 128  # rows and columns that share one scale of float8
TILE_ROWS, TILE_COLUMNS = 8, 32  # of int8 and int4, kernels/quantised.py; the columns share one scale
SCALE = ".scale"  # the scales of a role's weight lie under the role's name with this ending
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to store a matrix. ``dtype``: of the tensor that has the matrix's own name, as safetensors calls it."""

    name: str
    dtype: str
    matrices_only: bool = False

    def parts(self, shape: Shape) -> Mapping[str, tuple[str, Shape]]:
        """The tensors of a weight of ``shape``: what is added to its name -> dtype and shape."""
        return {"": (self.dtype, shape)}


@dataclass(frozen=True, slots=True)
class BlockLayout(Layout):
    """DeepSeek-V3's: float8 and a float32 scale for each block of 128 x 128 (arXiv 2412.19437, section 3.3.2)."""

    def parts(self, shape: Shape) -> Mapping[str, tuple[str, Shape]]:
        blocks = tuple(-(-size // SCALE_BLOCK) for size in shape)
        return {"": (self.dtype, shape), "_scale_inv": ("F32", blocks)}


@dataclass(frozen=True, slots=True)
class TileLayout(Layout):
    """Tiles of whole numbers, and a float16 scale for each of a tile's rows. ``bits``: of a number."""

    bits: int = 8

    def parts(self, shape: Shape) -> Mapping[str, tuple[str, Shape]]:
        tiles = -(-shape[0] // TILE_ROWS), -(-shape[1] // TILE_COLUMNS)
        stored = TILE_ROWS * TILE_COLUMNS * self.bits // 8
        return {"": (self.dtype, (*tiles, stored)), "_scale": ("F16", (*tiles, TILE_ROWS))}


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("f32", "F32"),
        Layout("bf16", "BF16"),
        Layout("f16", "F16"),
        BlockLayout("fp8", "F8_E4M3", matrices_only=True),
        TileLayout("int8", "I8", matrices_only=True, bits=8),
        TileLayout("int4", "U8", matrices_only=True, bits=4),
    )
}


def layout_of(dtype: str, shape: Shape) -> Layout | None:
    """The layout of a weight of ``shape`` whose main tensor has this dtype; None if there is none."""
    found = next((layout for layout in LAYOUTS.values() if layout.dtype == dtype), None)
    return None if found is None or (found.matrices_only and len(shape) != 2) else found


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of ``shape`` as it lies in files. ``parts``: what its layout adds to its name -> where that lies."""

    name: str
    shape: Shape
    layout: Layout
    parts: Mapping[str, TensorInfo]
