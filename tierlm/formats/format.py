"""What a format is: how the values of a weight are stored. Torch is imported only where values are converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Part = tuple[str, Shape]  # dtype, as safetensors calls it, and shape of a tensor


@dataclass(frozen=True)
class Format:
    """How the values of a weight are stored. This class alone describes a format that can only be planned for; a
    subclass adds ``parts``, ``make`` and ``widen``.

    ``block``: rows and columns that are stored as one; ``block_bytes``: what a block takes, scales included. ``dtype``:
    of the tensor that has the weight's own name; empty if nothing can be loaded in this format. ``matrices_only``:
    vectors cannot have it. ``floats``: it consists of floats alone, whose exponents compress well. ``rounds``: products
    round their activations to int8.
    """

    name: str
    block: tuple[int, int]
    block_bytes: int
    dtype: str = ""
    matrices_only: bool = True
    floats: bool = False
    rounds: bool = False

    def __post_init__(self) -> None:
        if min(*self.block, self.block_bytes) < 1:
            raise ValueError(f"format {self.name}: expected a block of at least one value, found {self.block}")

    @property
    def bits(self) -> float:
        """Bits of a value, its share of the scales included."""
        return 8 * self.block_bytes / (self.block[0] * self.block[1])

    @property
    def loadable(self) -> bool:
        return bool(self.dtype)

    def takes(self, shape: Shape) -> bool:
        """Whether a weight of ``shape`` can be stored in this format."""
        return self.loadable and (len(shape) == 2 or not self.matrices_only)

    def recognises(self, shape: Shape, find: Callable[[str], Part | None]) -> bool:
        """Whether a weight of ``shape`` is stored in this format. ``find``: ending of its name -> that tensor."""
        return all(find(ending) == part for ending, part in self.parts(shape).items())

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        """The tensors of a weight of ``shape``, data and then scales: ending of its name -> dtype and shape.

        The first dimension of each counts rows, or blocks of rows.
        """
        raise NotImplementedError(f"{self.name}: nothing can be loaded in this format")

    def make(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Data and scales of a finite float32 ``matrix``. Slices of whole blocks of rows give slices of them."""
        raise NotImplementedError(f"{self.name}: nothing can be stored in this format")

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape) -> Tensor:
        """The values, float32 of ``shape``."""
        raise NotImplementedError(f"{self.name}: nothing can be loaded in this format")

    def rows(self, part: Tensor, total: int, start: int, stop: int) -> Tensor:
        """Rows ``start``, the first of a block, to ``stop`` of a part of a weight that has ``total`` rows."""
        if part.shape[0] == total:
            return part[start:stop]
        return part[start // self.block[0] : -(-stop // self.block[0])]
