"""Four-bit formats of safetensors: MXFP4, NVFP4, and int4 in groups.

Each byte of a row holds two codes, the lower four bits first. A group of columns of a row shares a scale.

    mxfp4      OCP MX v1.0, as gpt-oss is published: e2m1 numbers; a power of two for 32
    mxfp4_ct   the same as compressed-tensors writes it: groups are not a dimension, and names differ
    nvfp4      as TensorRT Model Optimizer writes it: e2m1 numbers; a float8 for 16, and a float32 for the whole weight
    nvfp4_ct   as compressed-tensors writes it: the float32 divides
    int4_gN    compressed-tensors' pack-quantized, symmetric, as Kimi-K2-Thinking is published: eight numbers in an
               int32; a 16-bit float for N
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tierlm.formats.format import Format, Part, Shape
from tierlm.formats.ggml import E2M1, E8M0

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Nibbles(Format):
    """``numbers``: of the 16 codes. ``word``: bytes of an item of the data. ``blocked``: data are [out, groups, bytes
    of a group], else [out, items]. ``scale``: suffix and dtype of the scales [out, groups]; U8: indices of E8M0."""

    numbers: Sequence[float]
    scale: tuple[str, str]
    word: int = 1
    blocked: bool = False

    def takes(self, shape: Shape) -> bool:
        return super().takes(shape) and shape[1] % self.block[1] == 0

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        rows, group = shape[0], self.block[1]
        groups, ending = shape[1] // group, self.scale[0]
        data = (rows, groups, group // 2) if self.blocked else (rows, shape[1] // 2 // self.word)
        found = {self.suffix: (self.dtype, data), ending: (self.scale[1], (rows, groups))}
        return found | ({self.extra: ("F32", ())} if self.extra else {})

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        import torch

        assert scale is not None
        numbers = torch.tensor(self.numbers, dtype=torch.float32, device=data.device)
        pairs = torch.stack((numbers.repeat(16), numbers.repeat_interleave(16)), dim=-1)  # of each byte, [256, 2]
        values = pairs[data.view(torch.uint8).reshape(*scale.shape, -1).int()]  # [out, groups, bytes of a group, 2]
        powers = scale.dtype == torch.uint8
        scales = torch.tensor(E8M0, device=data.device)[scale.int()] if powers else scale.float()
        values = values.mul_(scales[..., None, None]).view(shape)
        if extra is None:
            return values
        return values.div_(extra.float()) if self.divides else values.mul_(extra.float())


HALVES = tuple(number / 2 for number in E2M1)
POWERS = ("_scales", "U8")
MXFP4 = Nibbles("mxfp4", (1, 32), 17, "U8", suffix="_blocks", numbers=E2M1, scale=POWERS, blocked=True)
MXFP4_CT = replace(MXFP4, name="mxfp4_ct", suffix="_packed", scale=("_scale", "U8"), blocked=False)
NVFP4 = Nibbles("nvfp4", (1, 16), 9, "U8", extra="_scale_2", numbers=HALVES, scale=("_scale", "F8_E4M3"))
NVFP4_CT = replace(NVFP4, name="nvfp4_ct", suffix="_packed", extra="_global_scale", divides=True)
GROUPS = tuple(
    Nibbles(
        f"int4_g{group}",
        (1, group),
        group // 2 + 2,
        "I32",
        suffix="_packed",
        numbers=range(-8, 8),
        scale=("_scale", "BF16"),
        word=4,
    )
    for group in (32, 64, 128)
)
