"""A weight in its stored format, and the formats supported by the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from tierlm.formats import FORMATS, Shape
from tierlm.formats.dtypes import torch_dtypes
from tierlm.formats.ggml import GGML
from tierlm.formats.transposed import TRANSPOSED

NIBBLES = ("mxfp4", "int4_g32", "int4_g64", "int4_g128", "nvfp4", "nvfp4_ct")


def _both(names: Iterable[str]) -> list[str]:
    """Formats that round activations, and then the same with unrounded ones."""
    once = list(names)
    return [*once, *(f"{name} exact" for name in once)]


# The formats of the tables in kernels/product.h, one table after the other: places are format numbers.
_TABLES = [
    *("f32", "bf16", "f16", "fp8"),
    *_both(("int8", "int4")),
    *_both(format.name for format in GGML),
    *NIBBLES,
    *("fp8 bfloat", "fp8_rows", "fp8_rows bfloat", "fp8_whole", "fp8_whole bfloat"),
    *_both(format.name for format in TRANSPOSED),
]


def _numbers(kind: str) -> dict[str, int]:
    """Numbers of the formats of a kind, "" or the word after their names."""
    split = [(*name.split(), "")[:2] for name in _TABLES]
    found = {name: number for number, (name, word) in enumerate(split) if word == kind}
    # Formats whose data and scales lie like another's.
    same = {"mxfp4_ct": "mxfp4", "fp8_blocks": "fp8", "fp8_inverse": "fp8_whole"}
    return found | {name: found[other] for name, other in same.items() if other in found}


NUMBERS, EXACT, BFLOAT = _numbers(""), _numbers("exact"), _numbers("bfloat")  # BFLOAT: with scales in bfloat16
TILES = ("int8", "int4")
ABSENT = (0,) * 6  # instead of an ``operand``
INTERLEAVED = (*TILES, *(format.name for format in TRANSPOSED))  # formats whose blocks have LANES rows
VECTORS = ("f32", "bf16", "f16")  # formats of norms and biases in the compiled kernels

DTYPES = torch_dtypes()


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [out, in] (or a vector [out]) in its stored format.

    ``data``, ``scale``, ``extra``: the parts of the format for a weight of ``shape``; (): the shape of ``data``.
    ``exact``: products keep activations in float32 even if the format rounds them to int8.
    Computed once, since every product needs them: ``rounds``: products round activations; ``tiled``: rows are
    interleaved; ``plain``: the compiled kernels support this matrix; ``operand``: struct Matrix of kernels/team.h, with
    a vector as one row.
    """

    data: Tensor
    format: str
    scale: Tensor | None = None
    shape: Shape = ()
    exact: bool = False
    extra: Tensor | None = None
    rounds: bool = field(init=False, repr=False, compare=False)
    tiled: bool = field(init=False, repr=False, compare=False)
    plain: bool = field(init=False, repr=False, compare=False)
    operand: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        data, scale, format = self.data, self.scale, self.format
        shape = self.shape or tuple(data.shape)
        second = self.extra if scale is None else scale
        bfloat = format in BFLOAT and second is not None and second.dtype == DTYPES["BF16"]
        numbers = BFLOAT if bfloat else EXACT if self.exact and format in EXACT else NUMBERS
        number = numbers.get(format, -1)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "rounds", FORMATS[format].rounds and not self.exact)
        object.__setattr__(self, "tiled", format in INTERLEAVED)
        object.__setattr__(self, "plain", number >= 0 and len(shape) == 2 and self._matches_format(bfloat))
        outs, ins = shape if len(shape) == 2 else (1, data.numel())
        pointers = [0 if part is None else part.data_ptr() for part in (data, scale, self.extra)]
        object.__setattr__(self, "operand", (number, *pointers[:2], outs, ins, pointers[2]))

    def _matches_format(self, bfloat: bool) -> bool:
        """Whether dtypes and shapes are those of the format, contiguous and on the CPU. ``bfloat``: with scales in
        bfloat16 instead of float32."""
        parts = [part for part in (self.data, self.scale, self.extra) if part is not None]
        expected = FORMATS[self.format].parts(self.shape).values()
        return len(parts) == len(expected) and all(
            part.device.type == "cpu"
            and part.is_contiguous()
            and (part.shape == shape or (not shape and part.numel() == 1))
            and part.dtype == DTYPES["BF16" if bfloat and dtype == "F32" else dtype]
            for part, (dtype, shape) in zip(parts, expected, strict=True)
        )

    def rows(self, start: int, stop: int) -> Weight:
        """Rows ``start`` to ``stop``, or to the last. ``start`` begins a block of the format."""
        known, total = FORMATS[self.format], self.shape[0]
        stop = min(stop, total)
        if stop - start == total:
            return self
        data, scale, extra = (
            None if part is None else known.rows(part, total, start, stop)
            for part in (self.data, self.scale, self.extra)
        )
        assert data is not None
        return Weight(data, self.format, scale, (stop - start, *self.shape[1:]), self.exact, extra)
