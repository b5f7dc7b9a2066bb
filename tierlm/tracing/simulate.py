"""Event-driven simulation of a trace on a described machine: reads, waits and times. Residency and lookahead are the
engine's own classes, over a simulated clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tierlm.errors import UsageError
from tierlm.policies.eviction import Policy
from tierlm.policies.lookahead import Lookahead
from tierlm.policies.prediction import NoPredictor, Predictor
from tierlm.policies.prefetch import Always, Measured, Prefetch
from tierlm.policies.residency import EntryState, Purpose, TierStats
from tierlm.spec import ExpertKey
from tierlm.tracing.link import Link
from tierlm.tracing.replay import Replayed, disk_places, expert_keys, find_misses
from tierlm.tracing.tiers import Entry, build_tiers
from tierlm.tracing.timing import AT_ONCE, Rates, elapsed
from tierlm.tracing.trace import Step, Trace


@dataclass
class Simulated:
    """The result. ``decoded``: tokens of decode steps, which took ``decode_seconds``; a step of several tokens demands
    each record once. Counts are of the top tier, as in TierStats; ``reads`` are of the disk. ``tiers``: counts of each
    tier from the top, if every event was simulated."""

    slots: int
    record_bytes: int
    tokens: int = 0
    decoded: int = 0
    demanded: int = 0
    missed: int = 0
    late_hits: int = 0
    prefetched: int = 0
    useful: int = 0
    wasted: int = 0
    cancelled: int = 0
    reads: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    stall_seconds: float = 0.0
    tiers: tuple[TierStats, ...] = ()

    @property
    def hit_rate(self) -> float:
        """The share of demands whose record was resident or in flight."""
        return 1 - self.missed / self.demanded if self.demanded else 0.0

    @property
    def bytes_read(self) -> int:
        return self.reads * self.record_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of decode steps; of all steps if the trace has no decode step."""
        return self.decoded / self.decode_seconds if self.decoded else self.tokens / self.seconds

    def as_json(self) -> dict[str, float]:
        more = {"hit_rate": self.hit_rate, "bytes_read": self.bytes_read, "tokens_per_second": self.tokens_per_second}
        more |= {"bytes_per_token": self.bytes_read / self.tokens, "stall_share": self.stall_seconds / self.seconds}
        own = asdict(self)
        del own["tiers"]
        return own | more


def simulate(
    trace: Trace,
    policy: Policy,
    predictor: Predictor,
    slots: int,
    machine: Rates,
    *,
    below: tuple[Policy, int] | None = None,
    prefetch: Prefetch | None = None,
) -> Simulated:
    """Run ``trace`` from empty slots, with a new ``policy`` and ``predictor``. ``below``: policy and slots of a second
    tier between the first and the disk. ``prefetch``: decides what is worth a read, by default Measured. Raises
    UsageError if the predictor needs routers' predictions and the trace has none."""
    if predictor.gates and trace.predictions is None:
        raise UsageError("this predictor asks the next layers' routers: it needs a trace recorded with --scores")
    demands = trace.demands
    at_once = demands.counts[~demands.prefill].max(initial=0) <= slots
    if predictor.lookahead or predictor.gates or below or not at_once:
        return _Run(trace, [(policy, slots), *([below] if below else [])], predictor, machine, prefetch).run()
    misses = find_misses(trace, policy, slots)
    decoded, missed = int(demands.tokens[~demands.prefill].sum()), int(misses.counts.sum())
    time = vars(elapsed(trace, misses, machine))
    return Simulated(slots, machine.record_bytes, len(trace), decoded, len(demands.ids), missed, reads=missed, **time)


def replay_tiers(trace: Trace, tiers: Sequence[tuple[Policy, int]]) -> list[Replayed]:
    """``replay`` for several tiers: a new policy and the slots of each, the top first."""
    machine = Rates(trace.info.record_bytes or 1, AT_ONCE, 0.0, 0.0)
    run = _Run(trace, tiers, NoPredictor(trace.experts.shape[2]), machine, Always()).run()
    return [Replayed(stats.hits + stats.late_hits + stats.misses, stats.misses) for stats in run.tiers]


class _Run:
    """One simulation: memory/store.py and models/moe.py over a clock."""

    def __init__(
        self,
        trace: Trace,
        tiers: Sequence[tuple[Policy, int]],
        predictor: Predictor,
        machine: Rates,
        prefetch: Prefetch | None,
    ):
        self.trace, self.machine = trace, machine
        self.disk = Link(machine.disk, machine.record_bytes)
        copies = [Link(machine.copy, machine.record_bytes) for _ in tiers[1:]]
        self.tier = build_tiers(tiers, [*copies, self.disk])
        self.now = 0.0
        self.prefetch = prefetch or Measured(lambda: self.now)
        self.prefetch.read(self.disk.seconds, 0.0)
        self._keys, self._places = expert_keys(trace), disk_places(trace)
        self._layers = [keys[0].layer for keys in self._keys]
        self.lookahead = Lookahead(predictor, self._layers, self.prefetch)
        self.result = Simulated(tiers[0][1], machine.record_bytes)
        self._rows = slice(0, 0)  # tokens of this step

    def run(self) -> Simulated:
        result = self.result
        for step, (start, stop) in zip(self.trace.passes(), self.trace.bounds(), strict=True):
            began, self._rows = self.now, slice(start, stop)
            for at in range(self.trace.moe_layers):
                self._layer(step, at)
            result.tokens += step.tokens
            if not step.prefill:
                result.decoded += step.tokens
                result.decode_seconds += self.now - began
        result.seconds, result.reads = self.now, self.disk.begun
        stats = self.tier.stats
        result.tiers = tuple(tier.stats for tier in self.tier.chain())
        result.demanded, result.missed = stats.hits + stats.late_hits + stats.misses, stats.misses
        result.late_hits, result.prefetched = stats.late_hits, stats.prefetched
        result.useful, result.wasted, result.cancelled = stats.useful, stats.wasted, stats.cancelled
        return result

    def _layer(self, step: Step, at: int) -> None:
        """As Decoder.forward, MixtureOfExperts.forward, Leases and Store.turn."""
        layer, prefill = self._layers[at], step.prefill
        tier, lookahead, result, machine = self.tier, self.lookahead, self.result, self.machine
        if lookahead.before_attention(prefill):
            self._look_ahead(layer, 0, prefill)
        self.now += machine.layer(step.tokens)
        targets = lookahead.targets(layer, prefill)
        wanted = [self._keys[at][expert] for expert in step.needed[at]]
        tier.settle(self.now)
        lookahead.turn(layer, set(wanted))
        tier.residency.protect(layer, ())
        tier.cancel_stale(layer, set(wanted), self.now)
        began, stalled, useful = self.now, result.stall_seconds, tier.stats.useful
        leased: list[Entry] = []
        missing: list[ExpertKey] = []
        for key in wanted:
            if (entry := tier.demand(key, prefill, self.now)) is None:
                missing.append(key)
            else:
                leased.append(entry)
        absent = len(missing) + tier.stats.useful - useful
        if prefill:
            missing = self._in_order(missing)
        pairs = int((self.trace.experts[self._rows, at] >= 0).sum()) if step.tokens > 1 else len(wanted)
        expert = machine.expert(step.tokens, pairs, len(wanted))
        self._start(leased, missing, prefill)
        lookahead.predictor.observe(layer, step.needed[at])
        for target, ahead in targets:
            self._look_ahead(target, ahead, prefill)
        while leased or missing:
            tier.settle(self.now)
            ready = [entry for entry in leased if entry.state is not EntryState.LOADING]
            self._start(leased, missing, prefill)
            if not ready:
                self._wait()
                continue
            for batch in [[entry] for entry in ready] if prefill else [ready]:
                self.now += expert * len(batch)
                for entry in batch:
                    leased.remove(entry)
                    tier.residency.release(entry)
                self._start(leased, missing, prefill)
        tier.end_turn(layer)
        self.prefetch.layer_done(absent, self.now - began - (result.stall_seconds - stalled), prefill)

    def _wait(self) -> None:
        """Wait for the next arrival."""
        arrival = max(self.now, self.tier.next_arrival())
        if arrival == math.inf:
            raise RuntimeError("a simulated layer waits for a record that is not in flight: this is a bug in tierlm")
        self.result.stall_seconds += arrival - self.now
        self.now = arrival

    def _start(self, leased: list[Entry], missing: list[ExpertKey], prefill: bool) -> None:
        """Start as many of ``missing`` as slots allow, then planned prefetches."""
        tier, now = self.tier, self.now
        while missing:
            key = missing[0]
            entry = tier.demand(key, prefill, now) or tier.start(key, Purpose.DEMAND, prefill, now)
            if entry is None:
                return
            leased.append(entry)
            missing.pop(0)
        self._start_reads()

    def _look_ahead(self, layer: int, ahead: int, prefill: bool) -> None:
        """As Store.look_ahead, if the trace has the router's prediction for ``layer`` that far ahead."""
        rows = None
        if self.lookahead.predictor.gates:
            assert self.trace.predictions is not None
            if ahead >= self.trace.predictions.shape[2]:
                return
            at, width = self._layers.index(layer), self.lookahead.predictor.width
            rows = self.trace.predictions[self._rows, at, ahead, :width].tolist()
            if rows[0][0] < 0:
                return
        keys = self.lookahead.predict(layer, rows)
        self.tier.cancel_stale(layer, set(keys), self.now, begun=False)
        self.tier.residency.protect(layer, keys)
        absent = [key for key in keys if key not in self.tier.residency.entries]
        chosen = self.lookahead.choose(layer, absent, ahead, prefill, self.disk.backlog())
        self.lookahead.plan(layer, self._in_order(chosen) if prefill else chosen, prefill)
        self._start_reads()

    def _start_reads(self) -> None:
        """As Store.start_reads."""
        while (wanted := self.lookahead.next_read(self.tier.residency.entries)) is not None:
            key, streaming = wanted
            if self.tier.start(key, Purpose.PREFETCH, streaming, self.now) is None:
                return

    def _in_order(self, keys: list[ExpertKey]) -> list[ExpertKey]:
        """``keys`` of one layer in disk order."""
        if self._places is None or not keys:
            return sorted(keys)
        place = self._places[self._layers.index(keys[0].layer)]
        return sorted(keys, key=lambda key: place[key.expert])
