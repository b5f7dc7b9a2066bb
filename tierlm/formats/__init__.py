"""The registry of formats: how the values of a weight are stored. Torch is imported only to convert values."""

from __future__ import annotations

from collections.abc import Callable

from tierlm.formats.floats import BF16, F16, F32
from tierlm.formats.format import Format, Part, Shape
from tierlm.formats.fp8 import FP8, OTHER_FP8
from tierlm.formats.ggml import GGML
from tierlm.formats.nibbles import GROUPS, MXFP4, MXFP4_CT, NVFP4, NVFP4_CT
from tierlm.formats.tiles import INT4, INT8
from tierlm.formats.transposed import TRANSPOSED

__all__ = ["FORMATS", "Format", "Part", "Shape", "recognise"]

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        F32,
        BF16,
        F16,
        FP8,
        INT8,
        INT4,
        *OTHER_FP8,
        MXFP4,
        MXFP4_CT,
        NVFP4,
        NVFP4_CT,
        *GROUPS,
        *TRANSPOSED,
        *GGML,
        Format("q4_k_m", (6, 256), 5 * 144 + 210),  # an expert in this mixture: half of the down projection is q6_k
    )
}


def recognise(shape: Shape, find: Callable[[str], Part | None]) -> Format | None:
    """The format of a weight of ``shape``, identified by its tensors in a file; None if no format has its dtype.

    ``find``: name suffix -> tensor, or None. If several formats match, the one with the most tensors wins. If none
    matches, returns the first with this dtype of data; its parts tell what is wrong.
    """
    found = {suffix: find(suffix) for suffix in {format.suffix for format in FORMATS.values()}}
    dtypes = {suffix: part[0] for suffix, part in found.items() if part is not None}
    possible = [each for each in FORMATS.values() if dtypes.get(each.suffix) == each.dtype and each.takes(shape)]
    if len(possible) > 1:
        whole = [format for format in possible if format.recognises(shape, find)]
        return max(whole or possible[:1], key=lambda format: len(format.parts(shape)))
    return possible[0] if possible else None
