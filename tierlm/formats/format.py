"""The interface of formats. Torch is imported only to convert values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Part = tuple[str, Shape]  # dtype (of safetensors, or a GGML type) and shape of a tensor


@dataclass(frozen=True)
class Format:
    """How the values of a weight are stored. A direct instance supports planning only; a subclass implements ``parts``,
    ``make`` and ``widen``.

    ``block``: rows and columns stored as one unit; ``block_bytes``: its size, scales included. ``dtype``: dtype of the
    data tensor; empty if the format cannot be loaded. ``matrices_only``: vectors cannot use it. ``floats``: all its
    tensors are floats, whose exponents compress well. ``rounds``: products round activations to int8.
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
        """Bits per value, scales included."""
        return 8 * self.block_bytes / (self.block[0] * self.block[1])

    @property
    def loadable(self) -> bool:
        return bool(self.dtype)

    @property
    def packable(self) -> bool:
        """Whether packed stores can hold it: its tensors have dtypes of safetensors, and ``make`` exists."""
        return self.loadable

    def takes(self, shape: Shape) -> bool:
        """Whether a weight of ``shape`` can be stored in this format."""
        return self.loadable and (len(shape) == 2 or not self.matrices_only)

    def recognises(self, shape: Shape, find: Callable[[str], Part | None]) -> bool:
        """Whether a weight of ``shape`` is stored in this format. ``find``: name suffix -> tensor, or None."""
        return all(find(suffix) == part for suffix, part in self.parts(shape).items())

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        """The tensors of a weight of ``shape``, data before scales: name suffix -> dtype and shape.

        The first dimension of each counts rows or blocks of rows.
        """
        raise NotImplementedError(f"{self.name}: nothing can be loaded in this format")

    def make(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Data and scales of a finite float32 ``matrix``. Blocks of rows are independent: a slice of ``matrix`` at
        block boundaries gives the same slice of the result."""
        raise NotImplementedError(f"{self.name}: nothing can be stored in this format")

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape) -> Tensor:
        """The values as float32, with ``shape``."""
        raise NotImplementedError(f"{self.name}: nothing can be loaded in this format")

    def rows(self, part: Tensor, total: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of one part of a weight of ``total`` rows. ``start`` begins a block."""
        if part.shape[0] == total:
            return part[start:stop]
        return part[start // self.block[0] : -(-stop // self.block[0])]
