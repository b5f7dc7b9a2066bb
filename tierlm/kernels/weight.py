"""A matrix as it is stored."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 128  # rows and columns that share one scale, DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3.2
LANES = 8  # rows of an int8 or int4 weight that lie interleaved, one in each lane of a vector
GROUP = 32  # columns of a row that share one scale in int8 and int4

FORMATS = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
    torch.uint8: "int4",
}
NUMBERS = {"f32": 0, "bf16": 1, "f16": 2, "fp8": 3, "int8": 4, "int4": 5}  # of the formats, in kernels/product.h
EXACT = {"int8": 6, "int4": 7}
VECTORS = ("f32", "bf16", "f16")  # formats that norms and biases may have for the compiled kernels


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [out, in] (or a vector [out]) in its stored format.

    ``data``: [out, in] in f32, bf16, f16 or fp8; in int8 and int4 the tiles of kernels/quantised.py.
    ``scale``: float32 [ceil(out / 128), ceil(in / 128)] that multiplies blocks of 128 x 128, for fp8; float16
    [ceil(out / 8), ceil(in / 32), 8] for int8 and int4; else None.
    ``size``: the logical (out, in) of an int8 or int4 weight, needed only where its tiles are padded.
    ``exact``: products with an int8 or int4 weight take the activations in float32, not rounded to int8.
    ``format``: one of ``FORMATS``, or the dtype's own name; ``quantised``: int8 or int4, in tiles; ``plain``: a matrix
    that the compiled kernels take as it lies; ``operand``: struct Matrix of kernels/team.h, a vector being one row.
    These four are found once, since every product asks.
    """

    data: Tensor
    scale: Tensor | None = None
    size: tuple[int, int] | None = None
    exact: bool = False
    format: str = field(init=False, repr=False, compare=False)
    quantised: bool = field(init=False, repr=False, compare=False)
    plain: bool = field(init=False, repr=False, compare=False)
    operand: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        data, scale, quantised = self.data, self.scale, self.data.dtype in (torch.int8, torch.uint8)
        known = data.device.type == "cpu" and data.dtype in FORMATS and data.dim() == (3 if quantised else 2)
        scaled = scale is None if data.dtype.itemsize > 1 else scale is not None and scale.is_contiguous()
        format = FORMATS.get(data.dtype, str(data.dtype))
        object.__setattr__(self, "format", format)
        object.__setattr__(self, "quantised", quantised)
        object.__setattr__(self, "plain", known and scaled and data.is_contiguous())
        number = (EXACT if self.exact and quantised else NUMBERS).get(format, -1)
        outs, ins = self.shape if len(self.shape) == 2 else (1, data.numel())
        pointers = data.data_ptr(), 0 if scale is None else scale.data_ptr()
        object.__setattr__(self, "operand", (number, *pointers, outs, ins))

    @property
    def rounds(self) -> bool:
        """Whether products with it take the activations rounded to int8."""
        return self.quantised and not self.exact

    @property
    def shape(self) -> torch.Size:
        """The logical shape."""
        if self.size is not None:
            return torch.Size(self.size)
        if self.quantised:
            return torch.Size((self.data.shape[0] * LANES, self.data.shape[1] * GROUP))
        return self.data.shape
