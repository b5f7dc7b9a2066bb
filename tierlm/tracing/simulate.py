"""A run of a trace on a machine that is described: what is read, what waits, how long it takes. Event-driven; the
policy, the predictor and the choice of guesses are the engine's own objects, over a clock of the simulation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tierlm.errors import UsageError
from tierlm.policies.eviction import Policy
from tierlm.policies.prediction import Predictor
from tierlm.policies.prefetch import Prefetch
from tierlm.policies.residency import Residency
from tierlm.spec import ExpertKey
from tierlm.tracing.link import Link
from tierlm.tracing.replay import disk_places, expert_keys, find_misses
from tierlm.tracing.timing import Rates, elapsed
from tierlm.tracing.trace import Step, Trace


@dataclass
class Simulated:
    """What happened. A late hit found its record on the way; all of ``missed`` had to be read for a demand.
    ``decoded``: tokens of decode steps, in ``decode_seconds``; a step of several tokens demands each record once."""

    slots: int
    record_bytes: int
    tokens: int = 0
    decoded: int = 0
    demanded: int = 0
    missed: int = 0
    late_hits: int = 0
    guessed: int = 0
    useful: int = 0
    wasted: int = 0
    cancelled: int = 0
    reads: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    stall_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Demands that found their record there or on its way, of all."""
        return 1 - self.missed / self.demanded if self.demanded else 0.0

    @property
    def bytes_read(self) -> int:
        return self.reads * self.record_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of decode; of everything where the trace has no decode step."""
        return self.decoded / self.decode_seconds if self.decoded else self.tokens / self.seconds

    def as_json(self) -> dict[str, float]:
        more = {"hit_rate": self.hit_rate, "bytes_read": self.bytes_read, "tokens_per_second": self.tokens_per_second}
        more |= {"bytes_per_token": self.bytes_read / self.tokens, "stall_share": self.stall_seconds / self.seconds}
        return asdict(self) | more


def simulate(trace: Trace, policy: Policy, predictor: Predictor, slots: int, machine: Rates) -> Simulated:
    """Run ``trace``, slots empty at first. ``policy`` and ``predictor`` are used up by it. Raises UsageError where the
    predictor needs gates and the trace has no guesses of theirs."""
    if predictor.gates and trace.guesses is None:
        raise UsageError("this predictor asks the next layers' gates: it needs a trace recorded with --scores")
    demands = trace.demands
    at_once = demands.counts[~demands.prefill].max(initial=0) <= slots
    if predictor.lookahead or predictor.gates or not at_once:
        return _Run(trace, policy, predictor, slots, machine).run()
    misses = find_misses(trace, policy, slots)
    time, missed = elapsed(trace, misses, machine), int(misses.counts.sum())
    return Simulated(
        slots,
        machine.record_bytes,
        tokens=len(trace),
        decoded=int(demands.tokens[~demands.prefill].sum()),
        demanded=len(demands.ids),
        missed=missed,
        reads=missed,
        seconds=time.seconds,
        decode_seconds=time.decode,
        stall_seconds=time.stalled,
    )


class _Run:
    """One simulation: memory/store.py and models/moe.py over a clock."""

    def __init__(self, trace: Trace, policy: Policy, predictor: Predictor, slots: int, machine: Rates):
        self.trace, self.predictor, self.machine = trace, predictor, machine
        self.tier = Residency(policy, slots)
        self.link = Link(machine.disk, machine.record_bytes)
        self.now = 0.0
        self.prefetch = Prefetch(lambda: self.now)
        self.prefetch.read_seconds.add(self.link.seconds)
        self.result = Simulated(slots, machine.record_bytes)
        self._keys, self._places = expert_keys(trace), disk_places(trace)
        self._hints: dict[int, tuple[list[ExpertKey], bool]] = {}
        self._likely: dict[int, list[ExpertKey]] = {}
        self._rows = slice(0, 0)  # the tokens of this step

    def run(self) -> Simulated:
        result = self.result
        for step, (start, stop) in zip(self.trace.passes(), self.trace.bounds(), strict=True):
            began, self._rows = self.now, slice(start, stop)
            for layer in range(self.trace.moe_layers):
                self._layer(step, layer)
            result.tokens += step.tokens
            if not step.prefill:
                result.decoded += step.tokens
                result.decode_seconds += self.now - began
        result.seconds, result.reads = self.now, self.link.begun
        result.useful, result.wasted = self.tier.useful, self.tier.wasted
        return result

    def _layer(self, step: Step, layer: int) -> None:
        tier, result, machine = self.tier, self.result, self.machine
        if self.predictor.gates:
            self._look_ahead(layer, 0, step.prefill)
        self.now += machine.layer(step.tokens)
        self._settle()
        needed = step.needed[layer]
        wanted = [self._keys[layer][expert] for expert in needed]
        self._turn(layer, wanted)
        began, stalled, useful = self.now, result.stall_seconds, tier.useful
        missing: list[ExpertKey] = []
        for key in wanted:
            if not tier.demand(key, step.prefill):
                missing.append(key)
            elif key in tier.loading:
                result.late_hits += 1
                self.link.promote(key, self.now)
        absent = len(missing) + tier.useful - useful
        result.demanded += len(wanted)
        result.missed += len(missing)
        gone = set(missing)
        held = [key for key in wanted if key not in gone]
        if step.prefill:
            missing = self._in_order(layer, missing)
        self._start(held, missing, step.prefill)
        self.predictor.observe(self.trace.info.moe_layers[layer], needed)
        for ahead in range(1, self.predictor.lookahead + 1):
            self._look_ahead(layer + ahead, ahead, step.prefill)
        pairs = self._pairs(layer) if step.tokens > 1 else len(needed)
        expert = machine.expert(step.tokens, pairs, len(needed))
        while held or missing:
            self._settle()
            ready = [key for key in held if key not in tier.loading]
            if not ready:
                there = max(self.now, self.link.wait(held))
                result.stall_seconds += there - self.now
                self.now = there
                continue
            for batch in [[key] for key in ready] if step.prefill else [ready]:
                self.now += expert * len(batch)
                for key in batch:
                    held.remove(key)
                    tier.release(key)
                self._start(held, missing, step.prefill)
        self.prefetch.layer_done(absent, self.now - began - (result.stall_seconds - stalled), step.prefill)

    def _pairs(self, layer: int) -> int:
        """The (token, choice) pairs of this step."""
        return int((self.trace.experts[self._rows, layer] >= 0).sum())

    def _start(self, held: list[ExpertKey], missing: list[ExpertKey], streaming: bool) -> None:
        """Start as many of ``missing`` as there are slots for, and what was hinted at behind them."""
        while missing:
            key = missing[0]
            if not self.tier.start(key, streaming):
                return
            self._submit(key, guess=False)
            held.append(missing.pop(0))
        self._follow()

    def _submit(self, key: ExpertKey, guess: bool) -> None:
        self.tier.loading.add(key)
        self.link.submit(key, self.now, guess)

    def _settle(self) -> None:
        """Take note of what has arrived by now."""
        if self.tier.loading:
            self.tier.loading.difference_update(self.link.arrived(self.now))

    def _turn(self, layer: int, wanted: Sequence[ExpertKey]) -> None:
        """``layer`` runs now: what was guessed about it and is not ``wanted`` has been wrong. As Store.turn."""
        number, right = self.trace.info.moe_layers[layer], set(wanted)
        self.prefetch.turn(number, right)
        self._hints.pop(layer, None)
        if self._likely.pop(layer, None) is not None:
            self.tier.protect(key for likely in self._likely.values() for key in likely)
        self._drop(number, right, begun=True)

    def _drop(self, number: int, right: set[ExpertKey], begun: bool) -> None:
        """Cancel the guesses about layer ``number`` that are not ``right``; those that have begun are wasted."""
        for key in [key for key in self.tier.guessed if key.layer == number and key not in right]:
            if key in self.tier.loading and self.link.cancel(key):
                self.tier.discard(key)
                self.result.cancelled += 1
            elif begun:
                self.tier.waste(key)

    def _look_ahead(self, layer: int, ahead: int, prefill: bool) -> None:
        """As MixtureOfExperts._target and _hint; after the last layer comes the first one of the next token."""
        gates = self.predictor.gates
        wraps = layer >= self.trace.moe_layers
        if wraps:
            layer -= self.trace.moe_layers
        if (gates and wraps) or (prefill and not gates) or not self.prefetch.due(ahead, prefill):
            return
        number = self.trace.info.moe_layers[layer]
        if gates:
            assert self.trace.guesses is not None
            if ahead >= self.trace.guesses.shape[2]:
                return
            ranked = self.trace.guesses[self._rows, layer, ahead, : self.predictor.width].T.flatten().tolist()
            if ranked[0] < 0:
                return  # nobody asked so early
            self.predictor.observe_gate(number, [expert for expert, _ in Counter(ranked).most_common()])
        self._hint(layer, self.predictor.predict(number), ahead, prefill)

    def _hint(self, layer: int, keys: list[ExpertKey], ahead: int, prefill: bool) -> None:
        """As Store.hint."""
        number = self.trace.info.moe_layers[layer]
        self._drop(number, set(keys), begun=False)
        self._likely[layer] = list(keys)
        self.tier.protect(key for likely in self._likely.values() for key in likely)
        absent = [key for key in keys if key not in self.tier.resident]
        backlog = self.link.backlog() * self.link.seconds
        chosen = self.prefetch.choose(number, absent, ahead, prefill, backlog)
        self._hints[layer] = (self._in_order(layer, chosen) if prefill else chosen, prefill)
        self._follow()

    def _follow(self) -> None:
        """Start the reads of hints, the next layer's first, as far as there are slots."""
        for hints, streaming in self._hints.values():
            while hints:
                key = hints[0]
                if key not in self.tier.resident:
                    self._settle()
                    if not self.tier.start(key, streaming, guess=True):
                        return
                    self._submit(key, guess=True)
                    self.result.guessed += 1
                hints.pop(0)

    def _in_order(self, layer: int, keys: list[ExpertKey]) -> list[ExpertKey]:
        if self._places is None:
            return sorted(keys)
        place = self._places[layer]
        return sorted(keys, key=lambda key: place[key.expert])
