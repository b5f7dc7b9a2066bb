"""The plan for a budget: which trunks stay resident, the expert slots of each tier, and the floor. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from tierlm.config import format_size
from tierlm.errors import BudgetError
from tierlm.spec import Dense, ModelSpec, UnitKey
from tierlm.table import Table

AUTO_RAM = 0.8  # share of free memory that "auto" takes
MAX_LOGITS = 64 * 2**20  # bytes reserved for the result of a call for logits
SLACK = 48 * 2**20  # bytes of ram that cannot be counted: thread stacks, allocator rounding, library scratch


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts. ``trunk``: per streamed unit; ``expert``: the largest expert record; ``resident``:
    small tensors that never leave; ``kv``, ``workspace``: for this context and prefill chunk; ``states``: of
    sequences, two copies of each; ``staging``: KV blocks on their way to or from disk, in ram."""

    trunk: Mapping[UnitKey, int]
    expert: int
    experts: int  # in the whole model
    resident: int
    kv: int
    workspace: int
    logits: int  # the result of one call for logits, in ram
    states: int = 0
    staging: int = 0


@dataclass(frozen=True)
class TierPlan:
    """One tier: its resident trunks, the ring through which other trunks stream, and its expert slots.

    ``floor``: the least that works; ``parts``: what the plan uses; both in bytes.
    """

    trunk: tuple[UnitKey, ...]
    ring: int  # bytes of each of the ring's two slots; 0: nothing streams
    expert_slots: int
    floor: int
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Plan(Table):
    """The tiers of one model under one budget. ``vram`` is None if the compute tier is ``ram``."""

    ram: TierPlan
    vram: TierPlan | None

    @property
    def tiers(self) -> dict[str, TierPlan]:
        """By name, the compute tier first."""
        return {"ram": self.ram} if self.vram is None else {"vram": self.vram, "ram": self.ram}

    def rows(self) -> Iterator[tuple[str, str]]:
        """Contents of each tier."""
        for name, tier in self.tiers.items():
            yield name, ", ".join(f"{what} {format_size(size)}" for what, size in tier.parts.items() if size)
            yield "", f"{tier.expert_slots} expert slots; floor {format_size(tier.floor)}"
            streams = f"; others stream through two slots of {format_size(tier.ring)}" if tier.ring else ""
            held = max(0, tier.parts.get("trunk", 0) - 2 * tier.ring)
            yield "", f"{len(tier.trunk)} trunks stay, {format_size(held)}{streams}"


def workspace_bytes(spec: ModelSpec, chunk: int, context: int) -> int:
    """Peak bytes of activations for a step of ``chunk`` tokens: the largest of attention and feed-forward, float32.

    Attention: from its spec. MoE: one output per token and choice, a weighted copy, the rows of one expert, and the
    norms of ``Moe.beside``. Both: a few [chunk, hidden], and with ``mtp`` the states of a chunk that its layer reads.
    """
    common = (6 + 6 * spec.mtp) * chunk * spec.hidden
    attention = max(kind.workspace(chunk, context) for kind in {layer.attention for layer in spec.layers})
    moe = spec.moe
    widths = [0 if moe is None else moe.shared_width]
    widths += [layer.feed_forward.width for layer in spec.layers if isinstance(layer.feed_forward, Dense)]
    feed_forward = chunk * 3 * max(widths)
    if moe is not None:
        feed_forward += chunk * (2 * moe.experts_per_token * spec.hidden + 3 * moe.width + 4 * moe.experts)
        feed_forward += chunk * 6 * spec.hidden * moe.beside
    return 4 * (common + max(attention, feed_forward) + 4 * spec.vocab + 2**21)


def make_plan(
    sizes: Sizes,
    *,
    ram: int,
    vram: int | None,
    process: int,
    others: int = 0,
    min_slots: int,
    ram_slots: int | None = None,
    vram_slots: int | None = None,
    resident_trunks: int | None = None,
) -> Plan:
    """Divide a budget: trunks first, since every token uses all of them, then expert slots.

    ``process``: bytes of the interpreter and its libraries; ``others``: of other models in the process.
    ``min_slots``: one token's experts of one layer. ``ram_slots``, ``vram_slots``, ``resident_trunks``: upper limits.
    Raises BudgetError below the floor.
    """
    state = {"KV cache": sizes.kv, "activations": sizes.workspace, "routers and norms": sizes.resident}
    if sizes.states:
        state["states"] = sizes.states
    host = {"interpreter and libraries": process, "slack": SLACK, "logits": sizes.logits}
    if sizes.staging:
        host["KV blocks on their way"] = sizes.staging
    if others:
        host["other loaded models"] = others
    everything = list(sizes.trunk)
    if vram is None:
        return Plan(
            _plan_tier("ram", ram, host | state, sizes, everything, min_slots, ram_slots, resident_trunks), None
        )
    compute = _plan_tier("vram", vram, state, sizes, everything, min_slots, vram_slots, resident_trunks)
    streamed = [key for key in everything if key not in compute.trunk]
    # Trunks that stay in vram are loaded through the host's ring, so it must fit the largest of all.
    below = _plan_tier("ram", ram, host, sizes, streamed, 1, ram_slots, resident_trunks, through=everything)
    return Plan(below, compute)


def _plan_tier(
    tier: str,
    budget: int,
    fixed: Mapping[str, int],
    sizes: Sizes,
    trunk: list[UnitKey],
    min_slots: int,
    max_slots: int | None,
    max_trunks: int | None,
    through: list[UnitKey] | None = None,
) -> TierPlan:
    """Plan one tier that serves ``trunk``. ``through``: trunks that go through its ring while loading."""
    largest_first = sorted(trunk, key=lambda key: -sizes.trunk[key])
    sizes_first = [sizes.trunk[key] for key in largest_first]
    totals = [0, *accumulate(sizes_first)]
    streaming = max((sizes.trunk[key] for key in through or ()), default=0)

    def need(resident: int) -> tuple[int, int]:
        """Bytes of the ``resident`` largest trunks and of one ring slot for the rest."""
        return totals[resident], max(*sizes_first[resident : resident + 1], streaming, 0)

    slots = min(min_slots, sizes.experts, max_slots or min_slots)
    least = slots * sizes.expert
    counts = range(min(len(trunk), len(trunk) if max_trunks is None else max_trunks) + 1)
    held, ring = min((need(n) for n in counts), key=_bytes)
    parts = {**fixed, "trunk": held + 2 * ring, "experts": least}
    floor = sum(parts.values())
    if budget < floor:
        dominant = max(parts, key=lambda name: parts[name])
        listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
        raise BudgetError(
            f"{tier} budget of {format_size(budget)} is below the floor of {format_size(floor)}; what dominates is "
            f"{dominant} with {format_size(parts[dominant])} ({listed}). Raise the {tier} budget"
            + (", or lower the context" if parts.get("KV cache", 0) > floor // 8 else "")
            + (", or close the other models of this process" if parts.get("other loaded models") else ""),
            tier=tier,
            floor=floor,
            given=budget,
            dominant=dominant,
        )
    room = budget - sum(fixed.values()) - least
    resident = max(n for n in counts if _bytes(need(n)) <= room)
    held, ring = need(resident)
    expert_slots = slots + (room - held - 2 * ring) // sizes.expert if sizes.experts else 0
    expert_slots = min(expert_slots, sizes.experts, max_slots or sizes.experts)
    used = {**fixed, "trunk": held + 2 * ring, "experts": expert_slots * sizes.expert}
    kept = set(largest_first[:resident])
    return TierPlan(tuple(key for key in trunk if key in kept), ring, expert_slots, floor, used)


def _bytes(pair: tuple[int, int]) -> int:
    """Bytes of (resident trunks, ring slot), with two ring slots."""
    return pair[0] + 2 * pair[1]
