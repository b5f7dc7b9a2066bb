"""The figures of ``/live``: what the page and ``tierlm top`` show."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tierlm.host import process_ram
from tierlm.live import LEGEND
from tierlm.server.service import Service
from tierlm.stats import Stats

FRESH = 0.5  # seconds for which figures are good enough for the next reader
WINDOW = 5.0  # seconds that rates look back


class Figures:
    """The figures of one server, made when somebody asks, at most once in FRESH seconds. Rates look back at what was
    counted for earlier readers, so the first one gets none."""

    def __init__(self, service: Service):
        self._service = service
        self._made: tuple[float, dict[str, Any]] | None = None
        self._samples = deque[tuple[float, Stats]]()  # the oldest first

    def now(self) -> dict[str, Any]:
        """The figures, in plain types."""
        service, moment = self._service, time.monotonic()
        if not service.ready:
            return service.state()
        if self._made is None or moment - self._made[0] >= FRESH:
            self._made = moment, self._make(moment)
        return self._made[1]

    def _make(self, moment: float) -> dict[str, Any]:
        service, metrics = self._service, self._service.metrics
        stats, live = service.llm.stats(), service.llm.live()
        while self._samples and moment - self._samples[0][0] > WINDOW:
            self._samples.popleft()
        self._samples.append((moment, stats))
        began, before = self._samples[0]
        return {
            "model": service.name,
            "status": "ready",
            "requests": {"live": service.live, "limit": service.limits.requests},
            "sequences": {"running": live.running, "waiting": live.waiting},
            "seconds": {
                "first_token": metrics.first_token.percentiles(),
                "next_token": metrics.next_token.percentiles(),
            },
            "rates": rates(before, stats, moment - began) if moment > began else None,
            "kv": {"tokens": live.kv_tokens, "reserved": live.kv_reserved, "context": live.context},
            "memory": {
                "process": process_ram(),
                "plan": {name: dict(tier.parts) for name, tier in stats.plan.tiers.items()},
            },
            "legend": LEGEND,
            "experts": live.experts,
        }


def rates(before: Stats, after: Stats, seconds: float) -> dict[str, Any]:
    """What was counted between two statistics, each second: tokens; bytes of each link, and the share of the time in
    which it was busy; experts that each tier was asked for, by result."""
    links, experts = _change(before.links, after.links), _change(before.experts, after.experts)
    return {
        "over": seconds,
        "prompt_tokens": (after.prompt_tokens - before.prompt_tokens) / seconds,
        "new_tokens": (after.new_tokens - before.new_tokens) / seconds,
        "links": {
            name: {"bytes": link["bytes"] / seconds, "busy": min(1.0, link["seconds"] / seconds)}
            for name, link in links.items()
        },
        "experts": {
            name: {result: tier[result] / seconds for result in ("hits", "late_hits", "misses")}
            for name, tier in experts.items()
        },
    }


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By name, what has been added to each counter. A link appears with its first transfer."""
    old = {name: asdict(counters) for name, counters in before.items()}
    return {
        name: {what: value - old.get(name, {}).get(what, 0) for what, value in asdict(counters).items()}
        for name, counters in after.items()
    }
