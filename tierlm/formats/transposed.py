"""Four-bit integers of AWQ and GPTQ, with columns first.

Eight numbers are an int32, the first in its lowest bits. A group of columns of a row shares a scale and a zero point;
a value is scale * (number - zero). ``NAME.weight`` is stored as

    NAME.qweight   awq    int32 [in, out / 8]    of eight rows, in ORDER
                   gptq   int32 [in / 8, out]    of eight columns
    NAME.qzeros           int32 [groups, out / 8]    of eight rows, in ORDER (awq) or one after the other (gptq)
    NAME.scales           float16 [groups, out]

awq_gN is the layout "gemm" of AutoAWQ. gptq_gN is that of AutoGPTQ, whose zeros are stored less one, as whole words
(GPTQModel, utils/model.py). gptq_v2_gN stores them as they are; the container calls them ``.qzeros_v2``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tierlm.formats.format import Format, Part, Shape

if TYPE_CHECKING:
    from torch import Tensor

WORD = 8  # numbers in an int32
IN_ORDER = tuple(range(WORD))
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which number of a word belongs to each of AWQ's eight rows
ONES = 0x11111111


@dataclass(frozen=True, kw_only=True)
class Transposed(Format):
    """``order``: of a word's numbers. ``down``: words of the data hold columns. ``less``: added to words of zeros."""

    order: Sequence[int]
    down: bool
    less: int

    def takes(self, shape: Shape) -> bool:
        return super().takes(shape) and all(size % unit == 0 for size, unit in zip(shape, self.block, strict=True))

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        outs, ins = shape
        data = (ins // WORD, outs) if self.down else (ins, outs // WORD)
        groups = ins // self.block[1]
        return {
            self.suffix: (self.dtype, data),
            ".scales": ("F16", (groups, outs)),
            self.extra: ("I32", (groups, outs // WORD)),
        }

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        assert scale is not None and extra is not None
        outs, ins = shape
        numbers = _numbers(data, IN_ORDER).transpose(1, 2) if self.down else _numbers(data, self.order)
        zeros = _numbers(extra + self.less, self.order).reshape(len(scale), 1, -1)[..., :outs]
        groups = numbers.reshape(len(scale), self.block[1], -1)[..., :outs] - zeros
        return (groups.float() * scale.float()[:, None]).view(ins, outs).t().contiguous()

    def rows(self, part: Tensor, total: int, start: int, stop: int) -> Tensor:
        """Rows are columns of the parts, or of their words."""
        unit = total // part.shape[1]
        return part[:, start // unit : -(-stop // unit)]


def _numbers(words: Tensor, order: Sequence[int]) -> Tensor:
    """int32 [...] -> int32 [..., 8]."""
    import torch

    shifts = torch.tensor(order, dtype=torch.int32, device=words.device) * 4
    return words[..., None] >> shifts & 15


def _groups(name: str, group: int, order: Sequence[int], down: bool, less: int) -> Transposed:
    return Transposed(
        f"{name}_g{group}",
        (WORD, group),
        WORD * (group // 2 + 2) + 4,
        "I32",
        suffix=".qweight",
        extra=".qzeros",
        rounds=True,
        order=order,
        down=down,
        less=less,
    )


SIZES = 32, 64, 128
AWQ = tuple(_groups("awq", size, ORDER, False, 0) for size in SIZES)
GPTQ = tuple(_groups("gptq", size, IN_ORDER, True, ONES) for size in SIZES)
GPTQ_V2 = tuple(
    replace(format, name=format.name.replace("gptq", "gptq_v2"), extra=".qzeros_v2", less=0) for format in GPTQ
)
TRANSPOSED = (*AWQ, *GPTQ, *GPTQ_V2)
