"""The torch dtypes of stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """Name in safetensors, or GGML type -> torch dtype."""
    import torch

    from tierlm.formats.ggml import GGML

    return {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F8_E4M3": torch.float8_e4m3fn,
        "I8": torch.int8,
        "U8": torch.uint8,
        "I32": torch.int32,
        **{format.dtype: torch.uint8 for format in GGML},
    }
