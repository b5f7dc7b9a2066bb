"""Quantisation of matrices, and rounding of activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tierlm.formats import FORMATS
from tierlm.formats.tiles import GROUP
from tierlm.kernels import native
from tierlm.kernels.weight import DTYPES, TILES, Weight

NEGLIGIBLE = 1e-30  # a group of activations with no larger magnitude becomes zeros


def quantise(matrix: Tensor, format: str) -> Weight:
    """A finite float ``matrix`` [out, in] in ``format``. The compiled kernels, if any, make int8 and int4. Blocks of
    rows are independent: a slice of ``matrix`` at block boundaries gives the same slice of the result."""
    library = native.load()
    if library is None or format not in TILES or matrix.device.type != "cpu":
        return quantise_reference(matrix, format)
    shape = tuple(matrix.shape)
    data, scale = (torch.empty(size, dtype=DTYPES[dtype]) for dtype, size in FORMATS[format].parts(shape).values())
    made = Weight(data, format, scale, shape)
    library.quantise(matrix.float().contiguous(), made)
    return made


def quantise_reference(matrix: Tensor, format: str) -> Weight:
    """``quantise`` in torch."""
    data, scale = FORMATS[format].make(matrix.float())
    return Weight(data, format, scale, tuple(matrix.shape))


def rounded(x: Tensor) -> Tensor:
    """Activations float32 [T, in] rounded as in products with formats that round: in groups of 32 columns, to multiples
    of 1 / 127 of the largest magnitude, half to even. A group with an infinity or NaN becomes NaN."""
    groups = functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest <= NEGLIGIBLE, 0.0, torch.full_like(largest, 127).div_(largest))
    numbers = (groups * inverse).round_()
    return (numbers * (largest / 127)).flatten(1)[:, : x.shape[1]]
