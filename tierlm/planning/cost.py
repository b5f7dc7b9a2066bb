"""How long a model takes on a machine: seconds of a decode step and of a prefill, from rates that can be measured.

docs/planning.md explains each term, and how far it is from what was measured. No torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tierlm.formats import FORMATS
from tierlm.planning.plan import Plan
from tierlm.spec import UnitKey


class Formats(NamedTuple):
    """Names of formats: of the routed experts, of what every token uses, of the lm_head."""

    experts: str
    trunk: str
    head: str


BF16 = Formats("bf16", "bf16", "bf16")


@dataclass(frozen=True)
class Work:
    """What one token makes a model do. Weights and values are counts, sizes bytes of records.

    ``trunk_weights``: without embedding, head and shared experts. ``attention``: products for each token of context.
    ``stored``: the shares of the bytes of experts and of trunks that are read from the disk, where they are compressed.
    """

    layers: int
    moe_layers: int
    experts: int  # of a layer
    experts_per_token: int
    expert_weights: int
    expert_bytes: int
    shared_weights: int  # of all layers
    trunk_weights: int
    head_weights: int
    attention: int
    trunk_bytes: int
    formats: Formats = BF16
    stored: tuple[float, float] = (1.0, 1.0)

    @property
    def routed_weights(self) -> int:
        """Weights of the experts that a token uses."""
        return self.moe_layers * self.experts_per_token * self.expert_weights

    @property
    def active_weights(self) -> int:
        return self.routed_weights + self.shared_weights + self.trunk_weights + self.head_weights


@dataclass(frozen=True)
class Accelerator:
    """A card. ``memory`` and ``link`` (from host memory) in bytes a second, ``products`` in multiply-adds a second,
    ``launch``: seconds of a layer's step that no arithmetic hides."""

    memory: float
    link: float
    products: float
    launch: float = 2e-4


@dataclass(frozen=True)
class Machine:
    """The rates that time depends on. ``origins``: of each, whether it was measured, given, or assumed.

    ``disk`` in bytes a second, of reads of the size and depth that the engine uses; ``latency``: seconds of the
    first of them. ``weights``: by format, weights a second times one row. ``products``: by format and rows,
    multiply-adds a second of a product with that many rows. ``beside``: the shares of the arithmetic's and of the
    disk's speed that are left when both are at work on one row, ``beside_many`` on a prefill's. ``layer``: seconds
    of a layer's step that no kernel accounts for; ``record``: of a prefill for each expert that it goes through,
    likewise. ``touch``: seconds a byte that memory takes when it is first written to, in huge pages as slots are
    and in ordinary ones. ``start``: seconds from the command to the first byte loaded.
    """

    disk: float
    latency: float
    weights: Mapping[str, float]
    products: Mapping[str, Mapping[int, float]]
    beside: tuple[float, float]
    beside_many: tuple[float, float]
    layer: float
    record: float
    touch: tuple[float, float]
    start: float
    accelerator: Accelerator | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def product_rate(self, format: str, rows: float) -> float:
        """Multiply-adds a second at ``rows``, between those measured in proportion to the logarithm of the rows."""
        known = sorted(self.products[format].items())
        if rows <= known[0][0]:
            return known[0][1]
        for (low, slow), (high, fast) in itertools.pairwise(known):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return slow + share * (fast - slow)
        return known[-1][1]


@dataclass(frozen=True)
class Seconds:
    """One step: the whole, and what each resource would take alone. ``exposed``: of ``disk`` and ``link``, what the
    arithmetic does not hide."""

    total: float
    compute: float
    overhead: float
    disk: float
    link: float
    disk_bytes: float

    @property
    def exposed(self) -> float:
        return self.total - self.compute - self.overhead

    @property
    def bound(self) -> str:
        """What to make faster first."""
        waits = "disk" if self.disk >= self.link else "link"
        parts = {waits: self.exposed, "compute": self.compute, "dispatch": self.overhead}
        return max(parts, key=lambda name: parts[name])


def side_by_side(compute: float, reading: float, beside: tuple[float, float]) -> float:
    """Seconds of arithmetic and reads that need ``compute`` and ``reading`` alone, begun together: both at their share
    until one is through, then the other alone."""
    arithmetic, disk = beside
    together = min(compute / arithmetic, reading / disk)
    left = compute - together * arithmetic, reading - together * disk
    return together + max(left)


def cached_share(plan: Plan, work: Work) -> tuple[float, float]:
    """The shares of all experts that have slots: in the compute tier, and anywhere."""
    total = max(1, work.moe_layers * work.experts)
    above = (plan.ram if plan.vram is None else plan.vram).expert_slots / total
    everywhere = above + (0 if plan.vram is None else plan.ram.expert_slots / total)
    return min(above, 1.0), min(everywhere, 1.0)


def uniform_hits(share: float) -> float:
    """The hit rate if every expert is as likely as any other at each token: no policy does better, and no use of a
    real model is worse."""
    return share


def skewed_hits(share: float, work: Work, skew: float = 0.5, stickiness: float = 0.3) -> float:
    """The hit rate if experts are used as those of trained models are: with probability ``stickiness`` a token uses
    what the one before it used, else the expert of rank r with a probability in proportion to r ** -skew, and the
    most used ones are those in the slots. Both numbers are at the cautious end of what bench/synthetic.py cites."""
    slots = share * work.experts
    kept = min(1.0, slots / work.experts_per_token)
    slots = max(0.0, slots - stickiness * work.experts_per_token)  # the others hold what was used just now
    popular = sum(math.pow(rank, -skew) for rank in range(1, int(slots) + 1))
    popular += (slots - int(slots)) * math.pow(int(slots) + 1, -skew)
    everything = sum(math.pow(rank, -skew) for rank in range(1, work.experts + 1))
    return min(1.0, max(share, stickiness * kept + (1 - stickiness) * popular / everything))


def streamed_bytes(plan: Plan, sizes: Mapping[UnitKey, int]) -> tuple[int, int]:
    """Bytes of trunks that a pass through the model brings in anew: from the disk, and over the link."""
    below, above = set(plan.ram.trunk), set() if plan.vram is None else set(plan.vram.trunk)
    from_disk = sum(size for key, size in sizes.items() if key not in below | above)
    over_link = 0 if plan.vram is None else sum(size for key, size in sizes.items() if key not in above)
    return from_disk, over_link


def decode_seconds(
    work: Work, machine: Machine, hits: tuple[float, float], streamed: tuple[int, int], context: int
) -> Seconds:
    """One token's step. ``hits``: of the compute tier, and of all memory; ``streamed``: as ``streamed_bytes``."""
    missed = [work.moe_layers * work.experts_per_token * (1 - rate) for rate in hits]
    disk_bytes = missed[1] * work.expert_bytes * work.stored[0] + streamed[0] * work.stored[1]
    disk = disk_bytes / machine.disk + min(missed[1], work.moe_layers) * machine.latency
    stored = work.formats
    card = machine.accelerator
    if card is None:
        rates = machine.weights
        # A layer's reads begin when its router has chosen: its experts' arithmetic is beside them.
        mixture = work.routed_weights / rates[stored.experts] + work.shared_weights / rates[stored.trunk]
        other = work.trunk_weights / rates[stored.trunk] + work.head_weights / rates[stored.head]
        other += work.attention * context / rates["f32"]
        overhead = work.layers * machine.layer
        total = other + overhead + side_by_side(mixture, disk, machine.beside)
        return Seconds(total, mixture + other, overhead, disk, 0.0, disk_bytes)
    bits = [FORMATS[name].bits for name in stored]
    mixture = (work.routed_weights * bits[0] + work.shared_weights * bits[1]) / 8 / card.memory
    other = (work.trunk_weights * bits[1] + work.head_weights * bits[2]) / 8 / card.memory
    other += work.attention * context * FORMATS["f32"].bits / 8 / card.memory
    link = (missed[0] * work.expert_bytes + streamed[1]) / card.link
    overhead = work.layers * card.launch
    total = other + overhead + max(mixture, disk, link)  # nothing of the host's is in a card's way
    return Seconds(total, mixture + other, overhead, disk, link, disk_bytes)


def prefill_seconds(
    work: Work,
    machine: Machine,
    resident: float,
    streamed: tuple[int, int],
    tokens: int,
    chunk: int,
    slot_bytes: int = 0,
    workspace: float = 0,
) -> Seconds:
    """A prompt of ``tokens`` in chunks: each record once a chunk. ``resident``: the share of experts that are there
    already. ``slot_bytes``: of slots that nothing has been written to yet; ``workspace``: of activations, likewise."""
    fresh = 0.0 if machine.accelerator is not None else workspace * machine.touch[1]
    total = Seconds(fresh, 0.0, fresh, 0.0, 0.0, 0.0)
    for start in range(0, tokens, chunk):
        rows = min(chunk, tokens - start)
        used = work.experts * (1 - (1 - work.experts_per_token / work.experts) ** rows) if work.experts else 0.0
        together = rows * work.experts_per_token / used if used else 1.0
        experts_read = used * work.moe_layers * work.expert_bytes * (1 - resident)
        disk_bytes = experts_read * work.stored[0] + streamed[0] * work.stored[1]
        touch = min(slot_bytes, experts_read + streamed[0]) * machine.touch[0]
        slot_bytes = max(0, slot_bytes - int(experts_read + streamed[0]))
        disk = disk_bytes / machine.disk
        experts = rows * work.routed_weights
        trunk = rows * (work.trunk_weights + work.shared_weights)
        attention = work.attention * rows * (start + rows // 2)
        card = machine.accelerator
        if card is None:
            stored = work.formats
            compute = experts / machine.product_rate(stored.experts, together)
            compute += trunk / machine.product_rate(stored.trunk, rows) + attention / machine.product_rate("f32", rows)
            compute += work.head_weights / machine.weights[stored.head]  # of the last token alone
            overhead, link = work.layers * machine.layer + used * work.moe_layers * machine.record, 0.0
            whole = touch + overhead + side_by_side(compute, disk, machine.beside_many)
        else:
            compute, overhead = (
                (experts + trunk + attention + work.head_weights) / card.products,
                work.layers * card.launch,
            )
            link = (used * work.moe_layers * work.expert_bytes + streamed[1]) / card.link
            whole = touch + overhead + max(compute, disk, link)
        parts = (whole, compute, overhead + touch, disk, link, disk_bytes)
        total = Seconds(*(a + b for a, b in zip(_values(total), parts, strict=True)))
    return total


def load_seconds(machine: Machine, resident_bytes: int, stored: float = 1.0) -> float:
    """Loading the trunks that stay, of which the share ``stored`` is read."""
    return resident_bytes * stored / machine.disk + resident_bytes * machine.touch[0]


def _values(seconds: Seconds) -> tuple[float, ...]:
    return (seconds.total, seconds.compute, seconds.overhead, seconds.disk, seconds.link, seconds.disk_bytes)
