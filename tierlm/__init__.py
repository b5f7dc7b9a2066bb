"""tierlm: a tiered memory and offload runtime for mixture-of-experts language models larger than memory."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from tierlm.config import Budget, RuntimeOptions, SamplingParams
from tierlm.errors import (
    BudgetError,
    CheckpointError,
    ModelNotFoundError,
    NumericsError,
    PromptError,
    StorageError,
    TierlmError,
    TraceError,
    UnsupportedModelError,
    UsageError,
)

# OpenMP reads this when torch loads it. By default, its idle threads spin for milliseconds after each large product of
# a prefill, on cores that reads need (docs/results.md). Decoding does not wake them (kernels/pool.h).
# The user's own setting wins.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from tierlm.answer import Piece, Result
    from tierlm.async_llm import AsyncLLM
    from tierlm.conversation import Conversation
    from tierlm.engine.sampler import TokenLogprob
    from tierlm.live import Live
    from tierlm.llm import LLM
    from tierlm.stats import Stats

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "Conversation",
    "Live",
    "ModelNotFoundError",
    "NumericsError",
    "Piece",
    "PromptError",
    "Result",
    "RuntimeOptions",
    "SamplingParams",
    "Stats",
    "StorageError",
    "TierlmError",
    "TokenLogprob",
    "TraceError",
    "UnsupportedModelError",
    "UsageError",
]

_NEEDS_TORCH = {
    "AsyncLLM": "tierlm.async_llm",
    "Conversation": "tierlm.conversation",
    "LLM": "tierlm.llm",
    "Live": "tierlm.live",
    "Piece": "tierlm.answer",
    "Result": "tierlm.answer",
    "Stats": "tierlm.stats",
    "TokenLogprob": "tierlm.engine.sampler",
}


def __getattr__(name: str) -> Any:
    """Import names that need torch at first use, so that ``import tierlm`` is fast."""
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
