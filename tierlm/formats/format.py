"""The interface of formats. Torch is imported only to convert values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Shape = tuple[int, ...]
Part = tuple[str, Shape]  # dtype (of safetensors, or a GGML type) and shape of a tensor
SCALES = ("F32", "BF16", "F16")  # interchangeable dtypes of scales


@dataclass(frozen=True)
class Format:
    """How the values of a weight are stored. A direct instance supports planning only; a subclass implements ``parts``
    and ``widen``, and ``make`` if it is packable.

    ``block``: rows and columns stored as one unit; ``block_bytes``: its size, scales included. ``dtype``: dtype of the
    data tensor; empty if the format cannot be loaded. ``suffix``: of the data tensor's name, see ``part_name``.
    ``extra``: suffix of a third tensor: zero points, or one number that multiplies all values, or ``divides`` them;
    empty: none. ``matrices_only``: vectors cannot use it. ``floats``: all its tensors are floats, whose exponents
    compress well. ``rounds``: products round activations to int8. ``packable``: ``make`` exists, and makes tensors with
    dtypes of safetensors.
    """

    name: str
    block: tuple[int, int]
    block_bytes: int
    dtype: str = ""
    suffix: str = ""
    extra: str = ""
    divides: bool = False
    matrices_only: bool = True
    floats: bool = False
    rounds: bool = False
    packable: bool = False

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

    def takes(self, shape: Shape) -> bool:
        """Whether a weight of ``shape`` can be stored in this format."""
        return self.loadable and (len(shape) == 2 or not self.matrices_only)

    def recognises(self, shape: Shape, find: Callable[[str], Part | None]) -> bool:
        """Whether a weight of ``shape`` is stored in this format. ``find``: name suffix -> tensor, or None."""
        return all(self.fits(suffix, part, find(suffix)) for suffix, part in self.parts(shape).items())

    def fits(self, suffix: str, part: Part, found: Part | None) -> bool:
        """Whether a stored tensor is ``part``. Scales of one meaning are published in several float dtypes, a factor as
        a scalar or as a vector."""
        if found is None or found == part or suffix == self.suffix:
            return found == part
        dtypes = found[0] == part[0] or (found[0] in SCALES and part[0] in SCALES)
        return dtypes and (found[1] == part[1] or (not part[1] and math.prod(found[1]) == 1))

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        """The tensors of a weight of ``shape``: data, scales if any, extra if any. Name suffix -> dtype and shape; see
        ``fits``. The first dimension of data and scales counts rows or blocks of rows, unless ``rows`` says otherwise.
        """
        raise NotImplementedError(f"{self.name}: nothing can be loaded in this format")

    def make(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Data and scales of a finite float32 ``matrix``. Blocks of rows are independent: a slice of ``matrix`` at
        block boundaries gives the same slice of the result."""
        raise NotImplementedError(f"{self.name}: nothing can be stored in this format")

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        """The values as float32, with ``shape``."""
        raise NotImplementedError(f"{self.name}: nothing can be loaded in this format")

    def rows(self, part: Tensor, total: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of one part of a weight of ``total`` rows. ``start`` begins a block."""
        if part.numel() == 1:
            return part
        if part.shape[0] == total:
            return part[start:stop]
        return part[start // self.block[0] : -(-stop // self.block[0])]

    def divide(self, parts: Sequence[T]) -> tuple[T, T | None, T | None]:
        """Data, scale and extra of a weight's ``parts``, in their order."""
        data, *others = parts
        extra = others.pop() if self.extra else None
        return data, others[0] if others else None, extra


def part_name(name: str, suffix: str) -> str:
    """The name of a weight's tensor. A suffix with a dot replaces ``.weight``."""
    return name.removesuffix(".weight") + suffix if suffix.startswith(".") else name + suffix
