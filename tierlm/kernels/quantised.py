"""A matrix brought to a format, and activations rounded as some products take them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tierlm.formats import FORMATS
from tierlm.formats.tiles import GROUP
from tierlm.kernels import native
from tierlm.kernels.weight import DTYPES, EXACT, Weight

NEGLIGIBLE = 1e-30  # a group of activations with nothing larger is taken for zeros


def quantise(matrix: Tensor, format: str) -> Weight:
    """The weight in ``format`` nearest to a finite float ``matrix`` [out, in]: int8 and int4 by the compiled kernels,
    where there are any. Slices of whole blocks of rows give slices of it."""
    library = native.load()
    if library is None or format not in EXACT or matrix.device.type != "cpu":
        return quantise_reference(matrix, format)
    shape = tuple(matrix.shape)
    data, scale = (torch.empty(size, dtype=DTYPES[dtype]) for dtype, size in FORMATS[format].parts(shape).values())
    made = Weight(data, format, scale, shape)
    library.quantise(matrix.float().contiguous(), made)
    return made


def quantise_reference(matrix: Tensor, format: str) -> Weight:
    """``quantise`` in torch alone."""
    data, scale = FORMATS[format].make(matrix.float())
    return Weight(data, format, scale, tuple(matrix.shape))


def rounded(x: Tensor) -> Tensor:
    """Activations as products with int8 and int4 take them, float32 [T, in] both: in groups of 32 columns the nearest
    multiples of 1 / 127 of the largest; halves go to the even one. Not a number where a group has no finite largest."""
    groups = functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest <= NEGLIGIBLE, 0.0, torch.full_like(largest, 127).div_(largest))
    numbers = (groups * inverse).round_()
    return (numbers * (largest / 127)).flatten(1)[:, : x.shape[1]]
