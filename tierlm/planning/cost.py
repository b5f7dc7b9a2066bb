"""The cost model: seconds of a decode step and of a prefill, from measurable rates.

docs/planning.md explains each term and its error. No torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import NamedTuple

from tierlm.formats import FORMATS
from tierlm.planning.plan import Plan
from tierlm.planning.routing import Uniform
from tierlm.spec import UnitKey


class Formats(NamedTuple):
    """Names of formats: routed experts, trunk with shared experts, lm_head."""

    experts: str
    trunk: str
    head: str


BF16 = Formats("bf16", "bf16", "bf16")


@dataclass(frozen=True)
class Work:
    """The work of one token. Weights are counts; ``*_bytes`` are sizes of records.

    ``trunk_weights``: without embedding, head and shared experts. ``attention``: multiply-adds per token of context.
    ``stored``: compression ratios (bytes on disk / bytes) of experts and trunks.
    """

    layers: int
    moe_layers: int
    experts: int  # per layer
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
        """Weights of the routed experts of a token."""
        return self.moe_layers * self.experts_per_token * self.expert_weights

    @property
    def active_weights(self) -> int:
        return self.routed_weights + self.shared_weights + self.trunk_weights + self.head_weights


@dataclass(frozen=True)
class Accelerator:
    """A card. ``memory`` and ``link`` (from host memory) in bytes a second, ``products`` in multiply-adds a second.
    ``launch``: overhead of a layer in seconds."""

    memory: float
    link: float
    products: float
    launch: float = 2e-4


@dataclass(frozen=True)
class Machine:
    """The rates of a machine. ``origins``: whether each is measured, given or assumed.

    ``disk``: bytes a second with the engine's request size and depth; ``latency``: seconds of one read. ``weights``:
    by format, weights a second with one row. ``products``: by format and rows, multiply-adds a second. ``beside``:
    shares of their own speed that arithmetic with one row and the disk keep when they run together; ``beside_many``:
    with the rows of a prefill. ``layer``: overhead of a layer of a step in seconds; ``record``: overhead of an expert
    of a prefill. ``touch``: seconds a byte of the first write to memory, in huge pages (slots) and in ordinary ones.
    ``start``: seconds from the command to the first byte loaded.
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
        """Multiply-adds a second at ``rows``, interpolated over log(rows)."""
        known = sorted({**self.products[format], 1: self.weights[format]}.items())
        if rows <= known[0][0]:
            return known[0][1]
        for (low, slow), (high, fast) in itertools.pairwise(known):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return slow + share * (fast - slow)
        return known[-1][1]


@dataclass(frozen=True)
class Seconds:
    """The time of one step: ``total``, and of each resource alone. ``exposed``: transfers that arithmetic does not
    hide."""

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
        """The bottleneck."""
        waits = "disk" if self.disk >= self.link else "link"
        parts = {waits: self.exposed, "compute": self.compute, "dispatch": self.overhead}
        return max(parts, key=lambda name: parts[name])


def side_by_side(compute: float, reading: float, beside: tuple[float, float]) -> float:
    """Seconds of overlapped arithmetic and reads, which alone take ``compute`` and ``reading``: both at their share of
    speed until one ends, then the other at full speed."""
    arithmetic, disk = beside
    together = min(compute / arithmetic, reading / disk)
    return together + max(compute - together * arithmetic, reading - together * disk)


def cached_share(plan: Plan, work: Work) -> tuple[float, float]:
    """The shares of all experts that have slots: in the compute tier, and in any tier."""
    total = max(1, work.moe_layers * work.experts)
    above = (plan.ram if plan.vram is None else plan.vram).expert_slots / total
    everywhere = above + (0 if plan.vram is None else plan.ram.expert_slots / total)
    return min(above, 1.0), min(everywhere, 1.0)


def streamed_bytes(plan: Plan, sizes: Mapping[UnitKey, int]) -> tuple[int, int]:
    """Bytes of trunks that each pass through the model reads from disk and copies over the link."""
    below, above = set(plan.ram.trunk), set() if plan.vram is None else set(plan.vram.trunk)
    from_disk = sum(size for key, size in sizes.items() if key not in below | above)
    over_link = 0 if plan.vram is None else sum(size for key, size in sizes.items() if key not in above)
    return from_disk, over_link


def decode_seconds(
    work: Work,
    machine: Machine,
    hits: tuple[float, float],
    streamed: tuple[int, int],
    context: int,
    batch: int = 1,
    used: float | None = None,
) -> Seconds:
    """One decode step of ``batch`` sequences, each after ``context`` tokens. ``used``: distinct experts of a layer, by
    default those of one token. ``hits``: hit rates of these in the compute tier and in all memory; ``streamed``: see
    streamed_bytes."""
    used = work.experts_per_token if used is None else used
    missed = [work.moe_layers * used * (1 - rate) for rate in hits]
    disk_bytes = missed[1] * work.expert_bytes * work.stored[0] + streamed[0] * work.stored[1]
    disk = disk_bytes / machine.disk + min(missed[1], work.moe_layers) * machine.latency
    stored = work.formats
    card = machine.accelerator
    attention = batch * work.attention * context
    if card is None:
        together = batch * work.experts_per_token / used if used else 1.0  # rows of an expert
        trunk = batch / machine.product_rate(stored.trunk, batch)
        # A layer's reads start after its router, so they overlap the experts' arithmetic only.
        mixture = batch * work.routed_weights / machine.product_rate(stored.experts, together)
        mixture += work.shared_weights * trunk
        other = work.trunk_weights * trunk + attention / machine.weights["f32"]
        other += batch * work.head_weights / machine.product_rate(stored.head, batch)
        overhead = work.layers * machine.layer
        total = other + overhead + side_by_side(mixture, disk, machine.beside)
        return Seconds(total, mixture + other, overhead, disk, 0.0, disk_bytes)
    bits = [FORMATS[name].bits for name in stored]
    routed = used * work.moe_layers * work.expert_weights  # read once for all sequences
    mixture = (routed * bits[0] + work.shared_weights * bits[1]) / 8 / card.memory
    mixture = max(mixture, batch * (work.routed_weights + work.shared_weights) / card.products)
    other = (work.trunk_weights * bits[1] + work.head_weights * bits[2]) / 8 / card.memory
    other = max(other, batch * (work.trunk_weights + work.head_weights) / card.products)
    other += attention * FORMATS["f32"].bits / 8 / card.memory
    link = (missed[0] * work.expert_bytes + streamed[1]) / card.link
    overhead = work.layers * card.launch
    total = other + overhead + max(mixture, disk, link)  # the host does not slow the card down
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
    """A prompt of ``tokens`` in chunks; each chunk reads each record once. ``resident``: share of experts in memory.
    ``slot_bytes``, ``workspace``: bytes of slots and activations that have never been written."""
    fresh = 0.0 if machine.accelerator is not None else workspace * machine.touch[1]
    total = Seconds(fresh, 0.0, fresh, 0.0, 0.0, 0.0)
    for start in range(0, tokens, chunk):
        rows = min(chunk, tokens - start)
        used = Uniform(work.experts, work.experts_per_token).used(rows)
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
            compute += work.head_weights / machine.weights[stored.head]  # the last token only
            overhead, link = work.layers * machine.layer + used * work.moe_layers * machine.record, 0.0
            whole = touch + overhead + side_by_side(compute, disk, machine.beside_many)
        else:
            compute = (experts + trunk + attention + work.head_weights) / card.products
            overhead = work.layers * card.launch
            link = (used * work.moe_layers * work.expert_bytes + streamed[1]) / card.link
            whole = touch + overhead + max(compute, disk, link)
        parts = (whole, compute, overhead + touch, disk, link, disk_bytes)
        total = Seconds(*(a + b for a, b in zip(astuple(total), parts, strict=True)))
    return total


def load_seconds(machine: Machine, resident_bytes: int, stored: float = 1.0) -> float:
    """Loading the resident trunks. ``stored``: their compression ratio."""
    return resident_bytes * stored / machine.disk + resident_bytes * machine.touch[0]
