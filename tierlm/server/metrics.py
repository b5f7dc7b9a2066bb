"""What Prometheus reads from ``/metrics``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tierlm.async_llm import AsyncLLM

FIRST = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)  # seconds to the first token
NEXT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # seconds between tokens
LATEST = 1000  # times that percentiles are taken of


class Times:
    """Seconds that were measured: all of them as a ``histogram``, the latest as percentiles."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram, self._latest = histogram, deque[float](maxlen=LATEST)

    def observe(self, seconds: float) -> None:
        self._histogram.observe(seconds)
        self._latest.append(seconds)

    def percentiles(self) -> dict[str, float] | None:
        """The 50th, 95th and 99th of the latest, and how many these are; None before the first."""
        if not (found := sorted(self._latest)):
            return None
        return {f"p{part}": found[-(-len(found) * part // 100) - 1] for part in (50, 95, 99)} | {"of": len(found)}


class Metrics:
    """The figures of one server, in a registry of its own. ``live``: the number of requests that run or wait."""

    def __init__(self, live: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("tierlm_requests", "Requests by outcome.", ["outcome"], registry=own)
        self.refused = Counter("tierlm_requests_refused", "Requests refused for lack of a place.", registry=own)
        Gauge("tierlm_requests_live", "Requests that run or wait.", registry=own).set_function(live)
        self.prompt_tokens = Counter("tierlm_prompt_tokens", "Tokens of the prompts of ended requests.", registry=own)
        self.cached_tokens = Counter(
            "tierlm_prompt_tokens_cached", "Those of them that were not computed, but kept.", registry=own
        )
        self.new_tokens = Counter("tierlm_new_tokens", "Tokens sent.", registry=own)
        first, following = "tierlm_time_to_first_token_seconds", "tierlm_time_per_output_token_seconds"
        self.first_token = Times(Histogram(first, "From the request to its first text.", buckets=FIRST, registry=own))
        self.next_token = Times(Histogram(following, "From one text to the next, a token.", buckets=NEXT, registry=own))

    def watch(self, llm: AsyncLLM) -> None:
        """Add what the model counts itself."""
        self.registry.register(Tiers(llm))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Tiers:
    """Hits and misses by tier, and bytes by link, read from the model when Prometheus asks."""

    def __init__(self, llm: AsyncLLM):
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        stats = self._llm.stats()
        requests = CounterMetricFamily(
            "tierlm_expert_requests", "Expert records demanded, by tier and result.", labels=["tier", "result"]
        )
        for name, tier in stats.experts.items():
            for result, count in (("hit", tier.hits), ("late_hit", tier.late_hits), ("miss", tier.misses)):
                requests.add_metric([name, result], count)
        moved = CounterMetricFamily("tierlm_link_bytes", "Bytes moved, by link.", labels=["link"])
        busy = CounterMetricFamily("tierlm_link_busy_seconds", "Seconds in which a link was busy.", labels=["link"])
        for name, link in stats.links.items():
            moved.add_metric([name], link.bytes)
            busy.add_metric([name], link.seconds)
        peak = GaugeMetricFamily("tierlm_peak_memory_bytes", "The process's largest resident memory.", stats.peak_ram)
        about = "How often a sequence gave way to another for lack of room."
        preempted = CounterMetricFamily("tierlm_preemptions", about, stats.preempted)
        yield from (requests, moved, busy, peak, preempted)
