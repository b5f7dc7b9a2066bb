"""Weights of random bytes in the block formats of GGUF, which tierlm reads and never makes."""

from __future__ import annotations

import torch
from torch import Tensor

from tierlm.formats import FORMATS
from tierlm.kernels import Weight

# Bytes in a block at which a float16 begins. All other bytes may have any value.
HALVES = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "mxfp4_ggml": (),
}


def some_blocks(shape: tuple[int, int], format: str, seed: int = 0, size: float = 1.0) -> Weight:
    """A weight whose values are about as large as ``size``, with scales of both signs."""
    known, generator = FORMATS[format], torch.Generator().manual_seed(seed)
    (_, stored) = known.parts(shape)[""]
    blocks = torch.randint(256, (*stored,), generator=generator, dtype=torch.uint8).view(-1, known.block_bytes)
    if not HALVES[format]:
        exponents = 126 + torch.tensor(size).log2().round() + torch.randint(-2, 2, (len(blocks),), generator=generator)
        blocks[:, 0] = exponents.to(torch.uint8)
    for at in HALVES[format]:
        blocks[:, at : at + 2] = _bytes(torch.ones(len(blocks)))
    scale = size / known.widen(blocks.view(stored), None, shape).std(correction=0)
    for at in HALVES[format]:
        signed = scale * (1 + torch.rand(len(blocks), generator=generator)) / 1.5
        signed *= torch.randint(0, 2, (len(blocks),), generator=generator) * 2 - 1
        blocks[:, at : at + 2] = _bytes(signed)
    return Weight(blocks.view(stored), format, None, shape)


def _bytes(values: Tensor) -> Tensor:
    return values.half().view(torch.uint8).view(-1, 2)
