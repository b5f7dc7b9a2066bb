"""Whether to read stored KV values or to compute them again: by the time that each is expected to take. No torch."""

from __future__ import annotations


def loading_pays(tokens: int, nbytes: int, disk: float, prefill: float | None) -> bool:
    """Whether the KV values of ``tokens``, ``nbytes`` on disk, are there sooner if they are read.

    ``disk``: bytes a second. ``prefill``: tokens a second so far, None before the first prompt. Then they are read: a
    token takes the arithmetic of all its weights, and its values are a few kilobytes.
    """
    return tokens > 0 and (prefill is None or nbytes / disk < tokens / prefill)
