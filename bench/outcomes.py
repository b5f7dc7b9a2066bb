"""What became of the requests of a run, and the arithmetic of a service: percentiles and goodput."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tierlm.profiling.profile import percentiles


@dataclass
class Outcome:
    """One request. Times in seconds from the start of the run: ``due``, when it should have been sent; ``first`` and
    ``last``, of its first and last text. ``status``: "ok", the number of an HTTP error, or the name of another."""

    due: float
    prompt: int
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    text: str = ""
    status: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token, counted from when the request was due: a client that is late does not help."""
        return self.first - self.due

    @property
    def tpot(self) -> float:
        """Seconds of each further token; 0 for a single one."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def meets(self, ttft: float, tpot: float) -> bool:
        """Whether it ended well, within both targets."""
        return self.status == "ok" and self.ttft <= ttft and self.tpot <= tpot


def summary(outcomes: Sequence[Outcome], seconds: float, ttft: float, tpot: float) -> dict[str, Any]:
    """The figures of a run. ``seconds``: in which requests arrive. ``goodput``: requests a second that met the targets
    ``ttft`` and ``tpot``; throughputs count until the last answer's end."""
    done = [one for one in outcomes if one.status == "ok"]
    good = sum(one.meets(ttft, tpot) for one in outcomes)
    end = max([seconds, *(one.last for one in done)])
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "statuses": dict(Counter(one.status for one in outcomes)),
        "requests_per_second": len(outcomes) / seconds,
        "goodput": good / seconds,
        "good_share": good / len(outcomes) if outcomes else 0.0,
        "tokens_per_second": sum(one.tokens for one in done) / end,
        "prompt_tokens_per_second": sum(one.prompt for one in done) / end,
        "seconds": end,
    }
    for name in ("ttft", "tpot"):
        values = [getattr(one, name) for one in done if name == "ttft" or one.tokens > 1]
        found[name] = dict(zip(("p50", "p90", "p99"), percentiles(values), strict=True)) if values else None
    return found
