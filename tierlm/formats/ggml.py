"""The block formats of GGUF files, as in ggml-common.h of llama.cpp.

A row of a weight [out, in] is a sequence of blocks, each with its scales; rows are independent. The data tensor has the
GGML type's name as dtype and is uint8 [out, in / columns of a block * bytes of a block]. All numbers are little-endian.
``gguf.quants.dequantize`` gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierlm.formats.format import Format, Part, Shape

if TYPE_CHECKING:
    from torch import Tensor

# Numbers of four-bit codes: IQ4's, and e2m1 times two; e8m0, divided by two.
CURVE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
E8M0 = tuple(2.0 ** (byte - 128) for byte in range(256))


@dataclass(frozen=True, kw_only=True)
class Blocks(Format):
    """``NAME`` holds the blocks. ``values``: blocks, uint8 [n, bytes] -> their values, float32 of n * columns."""

    values: Callable[[Tensor], Tensor]

    def takes(self, shape: Shape) -> bool:
        return super().takes(shape) and shape[1] % self.block[1] == 0

    def parts(self, shape: Shape) -> Mapping[str, Part]:
        return {"": (self.dtype, (shape[0], shape[1] // self.block[1] * self.block_bytes))}

    def widen(self, data: Tensor, scale: Tensor | None, shape: Shape, extra: Tensor | None = None) -> Tensor:
        return self.values(data.reshape(-1, self.block_bytes)).view(shape)


def _bits(data: Tensor, width: int, count: int, start: int = 0) -> Tensor:
    """``count`` fields of ``width`` bits in each byte, from bit ``start``: uint8 [..., k] -> [..., count, k]."""
    import torch

    return torch.stack([data >> start + width * i & (1 << width) - 1 for i in range(count)], dim=-2)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at``: float32 [n, 1]."""
    import torch

    return blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _looked_up(codes: Tensor, numbers: Sequence[float]) -> Tensor:
    import torch

    return torch.tensor(numbers, dtype=torch.float32, device=codes.device)[codes.int()]


def _fifth_bits(data: Tensor) -> Tensor:
    """32 bits, lowest first, as 0 or 16: uint8 [n, 4] -> [n, 32]."""
    return _bits(data[..., None], 1, 8).flatten(1) << 4


def _scales_and_minima(data: Tensor) -> tuple[Tensor, Tensor]:
    """Eight of each, six bits wide: uint8 [n, 12] -> float32 [n, 8, 1] each. The last four bytes hold the low four bits
    of the upper scales and minima, whose high two bits are those of the other bytes."""
    import torch

    scale, minimum, low = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((scale & 63, low & 15 | scale >> 2 & 48), dim=1)
    minima = torch.cat((minimum & 63, low >> 4 | minimum >> 2 & 48), dim=1)
    return scales.float()[..., None], minima.float()[..., None]


def _q8_0(blocks: Tensor) -> Tensor:
    import torch

    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_bits(blocks[:, 2:], 4, 2).flatten(1).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _bits(blocks[:, 4:], 4, 2).flatten(1).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _bits(blocks[:, 6:], 4, 2).flatten(1) | _fifth_bits(blocks[:, 2:6])
    return (numbers.float() - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _bits(blocks[:, 8:], 4, 2).flatten(1) | _fifth_bits(blocks[:, 4:8])
    return numbers.float() * _half(blocks, 0) + _half(blocks, 2)


def _q2_k(blocks: Tensor) -> Tensor:
    codes, n = blocks[:, :16], len(blocks)
    numbers = _bits(blocks[:, 16:80].view(n, 2, 32), 2, 4).view(n, 16, 16)
    scales, minima = _half(blocks, 80) * (codes & 15).float(), _half(blocks, 82) * (codes >> 4).float()
    return numbers.float() * scales[..., None] - minima[..., None]


def _q3_k(blocks: Tensor) -> Tensor:
    """A number is two bits, minus 4 where its bit in the first 32 bytes is 0."""
    n = len(blocks)
    high = _bits(blocks[:, :32], 1, 8).view(n, 16, 16)
    low = _bits(blocks[:, 32:96].view(n, 2, 32), 2, 4).view(n, 16, 16)
    scales = _bits(blocks[:, 96:104], 4, 2).view(n, 16) | _bits(blocks[:, 104:108], 2, 4).view(n, 16) << 4
    numbers = (low | high << 2).float() - 4
    return numbers * (_half(blocks, 108) * (scales.float() - 32))[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    numbers = _bits(blocks[:, 16:].view(-1, 4, 32), 4, 2).view(-1, 8, 32)
    return numbers.float() * (_half(blocks, 0)[..., None] * scales) - _half(blocks, 2)[..., None] * minima


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    numbers = _bits(blocks[:, 48:].view(-1, 4, 32), 4, 2).view(-1, 8, 32) | _bits(blocks[:, 16:48], 1, 8) << 4
    return numbers.float() * (_half(blocks, 0)[..., None] * scales) - _half(blocks, 2)[..., None] * minima


def _q6_k(blocks: Tensor) -> Tensor:
    import torch

    n = len(blocks)
    low = _bits(blocks[:, :128].view(n, 2, 64), 4, 2).view(n, 16, 16)
    high = _bits(blocks[:, 128:192].view(n, 2, 32), 2, 4).view(n, 16, 16)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return ((low | high << 4).float() - 32) * scales[..., None]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _looked_up(_bits(blocks[:, 2:], 4, 2).flatten(1), CURVE) * _half(blocks, 0)


def _iq4_xs(blocks: Tensor) -> Tensor:
    n = len(blocks)
    high = _bits(blocks[:, 2:4, None], 2, 4).view(n, 8)
    low = _bits(blocks[:, 4:8, None], 4, 2).view(n, 8)
    scales = _half(blocks, 0) * ((low | high << 4).float() - 32)
    return _looked_up(_bits(blocks[:, 8:].view(n, 8, 16), 4, 2).view(n, 8, 32), CURVE) * scales[..., None]


def _mxfp4(blocks: Tensor) -> Tensor:
    return _looked_up(_bits(blocks[:, 1:], 4, 2).flatten(1), E2M1) * _looked_up(blocks[:, :1], E8M0)


def _blocks(type: str, columns: int, nbytes: int, values: Callable[[Tensor], Tensor]) -> Blocks:
    return Blocks(type.lower(), (1, columns), nbytes, type, rounds=True, values=values)


GGML = (
    _blocks("Q8_0", 32, 34, _q8_0),
    _blocks("Q4_0", 32, 18, _q4_0),
    _blocks("Q4_1", 32, 20, _q4_1),
    _blocks("Q5_0", 32, 22, _q5_0),
    _blocks("Q5_1", 32, 24, _q5_1),
    _blocks("Q2_K", 256, 84, _q2_k),
    _blocks("Q3_K", 256, 110, _q3_k),
    _blocks("Q4_K", 256, 144, _q4_k),
    _blocks("Q5_K", 256, 176, _q5_k),
    _blocks("Q6_K", 256, 210, _q6_k),
    _blocks("IQ4_NL", 32, 18, _iq4_nl),
    _blocks("IQ4_XS", 256, 136, _iq4_xs),
    # gpt-oss's safetensors hold the same numbers in another order, with the scales in a tensor of their own.
    Blocks("mxfp4_ggml", (1, 32), 17, "MXFP4", rounds=True, values=_mxfp4),
)
