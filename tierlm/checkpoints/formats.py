"""From a record's bytes to weights that can be multiplied with, and from a matrix to a weight of some layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tierlm.checkpoints.checkpoint import Place, Record
from tierlm.checkpoints.layouts import SCALE, SCALE_BLOCK
from tierlm.kernels import Weight, gated_mlps
from tierlm.kernels.quantised import quantise

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}

Weights = Mapping[str, Weight]


def view(buffer: Tensor, place: Place) -> Tensor:
    """The tensor at ``place`` inside a record's bytes (uint8 [n]); a view, unless the file misaligns it."""
    data = buffer[place.offset : place.offset + place.nbytes]
    dtype = DTYPES[place.dtype]
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(place.shape)


def misaligned(buffer: Tensor, record: Record) -> bool:
    """Whether some weight of ``record`` in ``buffer`` would be a copy, since its file misaligns it."""
    start = buffer.storage_offset()
    return any((start + place.offset) % DTYPES[place.dtype].itemsize for place in record.places.values())


def weights_of(buffer: Tensor, record: Record, exact: bool = False) -> Weights:
    """All weights of a record by role, as views into its bytes. ``exact``: see Weight."""
    found: dict[str, Weight] = {}
    for role, place in record.places.items():
        if role.endswith(SCALE):
            continue
        scale = record.places.get(role + SCALE)
        size = None if place.size is None else (place.size[0], place.size[1])
        found[role] = Weight(view(buffer, place), None if scale is None else view(buffer, scale), size, exact)
    return found


def expert_ffns(jobs: Sequence[tuple[Tensor, Tensor, Weights]]) -> None:
    """Several routed experts: (x, y, weights), float32 [T, hidden] both; y, contiguous, is written."""
    gated_mlps([(x, y, (expert["gate_proj"], expert["up_proj"], expert["down_proj"])) for x, y, expert in jobs])


def _rounded(dtype: torch.dtype, matrix: Tensor) -> Weight:
    return Weight(matrix.to(dtype))


def _fp8(matrix: Tensor) -> Weight:
    """Each block of 128 x 128 scaled so that its largest value is the largest of float8."""
    outs, ins = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -ins % SCALE_BLOCK, 0, -outs % SCALE_BLOCK))
    rows, columns = (size // SCALE_BLOCK for size in padded.shape)
    blocks = padded.view(rows, SCALE_BLOCK, columns, SCALE_BLOCK)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    scale = torch.where(scale == 0, 1.0, scale)
    data = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return Weight(data.view(padded.shape)[:outs, :ins].contiguous(), scale)


# How a float32 matrix [out, in] becomes a weight of each layout. Slices of SCALE_BLOCK rows give slices of it.
MAKERS: dict[str, Callable[[Tensor], Weight]] = {
    "f32": partial(_rounded, torch.float32),
    "bf16": partial(_rounded, torch.bfloat16),
    "f16": partial(_rounded, torch.float16),
    "fp8": _fp8,
    "int8": partial(quantise, format="int8"),
    "int4": partial(quantise, format="int4"),
}
