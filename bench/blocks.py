"""A trace, or a block of its tokens, named FILE or FILE@START:STOP."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tierlm.errors import UsageError
from tierlm.tracing.trace import Trace
from tierlm.tracing.traceforms import read_trace


@cache
def read_block(name: str, scores: bool = False) -> Trace:
    """Cached per process. Raises UsageError for an invalid block, and TraceError for an invalid trace."""
    file, _, block = name.partition("@")
    trace = read_trace(Path(file), scores=scores)
    if not block:
        return trace
    start, _, stop = block.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop) <= len(trace)):
        raise UsageError(f"{name}: expected FILE@START:STOP, tokens from 0 to {len(trace)}, found {block!r}")
    return trace.part(int(start), int(stop))


def title(name: str) -> str:
    file, _, block = name.partition("@")
    return f"{Path(file).stem.replace('_', ' ')} {block.replace(':', ' to ')}".strip()
