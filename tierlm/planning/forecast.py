"""The forecast for a model, a budget and a machine: plan, expected speed, and the gain from more of each resource."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from tierlm.config import format_size
from tierlm.errors import BudgetError
from tierlm.planning.cost import (
    Machine,
    Seconds,
    Work,
    cached_share,
    decode_seconds,
    load_seconds,
    prefill_seconds,
    streamed_bytes,
)
from tierlm.planning.plan import Plan, Sizes, TierPlan, make_plan
from tierlm.planning.routing import Routing, Skewed, Uniform

GIB = 2**30
PROCESS = 256 * 2**20  # bytes of interpreter and libraries: the engine measures 242 MiB with torch 2.13 for CPUs
OS_SHARE = 0.9  # of a machine's memory; the system and other programs need the rest


@dataclass(frozen=True)
class Question:
    """The inputs of a forecast: budgets in bytes, lengths in tokens. ``batch``: sequences that decode together."""

    ram: int
    vram: int | None
    context: int
    prompt: int
    chunk: int
    process: int = PROCESS
    batch: int = 1


@dataclass(frozen=True)
class Speed:
    """Expected speed under one assumption about routing. Rates in tokens a second, those of ``decode`` of all sequences
    together; times in seconds. ``used``: distinct experts of a layer that a decode step uses."""

    hit_rate: float
    used: float
    decode: float
    step: Seconds
    prefill: float
    prompt: Seconds


@dataclass(frozen=True)
class Forecast:
    """``worst``: uniform routing. ``typical``: routing of trained models, or recorded. ``low``, ``high``: decode
    tokens/s, from the slower of both without overlap to the typical one with perfect overlap.

    ``first_token``: seconds from the request; ``load``, ``start``: once, before it. ``streamed``: trunk bytes read for
    each step. ``more``: decode tokens/s with more of a resource. ``warnings``: cliffs nearby.
    """

    plan: Plan
    worst: Speed
    typical: Speed
    low: float
    high: float
    load: float
    start: float
    first_token: float
    streamed: int
    more: Mapping[str, float]
    warnings: tuple[str, ...]


def forecast(
    sizes: Sizes,
    work: Work,
    machine: Machine,
    question: Question,
    ram_free: int | None = None,
    recorded: Routing | None = None,
) -> Forecast:
    """Answer ``question``. ``ram_free``: free memory, if the budget is for this machine. ``recorded``: the typical
    routing, instead of the assumed one. Raises BudgetError."""

    def plan_for(ram: int, vram: int | None) -> Plan:
        return make_plan(sizes, ram=ram, vram=vram, process=question.process, min_slots=work.experts_per_token or 1)

    usual = recorded or Skewed(work.experts, work.experts_per_token)
    plan = plan_for(question.ram, question.vram)
    worst = _speed(plan, sizes, work, machine, question, Uniform(work.experts, work.experts_per_token))
    typical = _speed(plan, sizes, work, machine, question, usual)
    streamed = streamed_bytes(plan, sizes.trunk)
    load = load_seconds(machine, sum(sizes.trunk[key] for tier in _tiers(plan) for key in tier.trunk), work.stored[1])

    def decode(machine: Machine, ram: int, vram: int | None) -> float | None:
        try:
            other = plan_for(ram, vram)
        except BudgetError:
            return None
        return _speed(other, sizes, work, machine, question, usual).decode

    ram, vram = question.ram, question.vram
    faster: dict[str, tuple[Machine, int, int | None]] = {
        "1 GiB more ram": (machine, ram + GIB, vram),
        "8 GiB more ram": (machine, ram + 8 * GIB, vram),
        "a disk twice as fast": (dataclasses.replace(machine, disk=2 * machine.disk), ram, vram),
    }
    if vram is None or machine.accelerator is None:
        twice = {name: 2 * rate for name, rate in machine.weights.items()}
        faster["arithmetic twice as fast"] = dataclasses.replace(machine, weights=twice), ram, vram
    else:
        card = dataclasses.replace(machine.accelerator, link=2 * machine.accelerator.link)
        faster["1 GiB more vram"] = machine, ram, vram + GIB
        faster["a link twice as fast"] = dataclasses.replace(machine, accelerator=card), ram, vram
    more = {name: speed for name, what in faster.items() if (speed := decode(*what)) is not None}
    alone = typical.step
    return Forecast(
        plan=plan,
        worst=worst,
        typical=typical,
        low=question.batch / max(_serial(worst.step), _serial(alone)),
        high=question.batch / max(alone.compute + alone.overhead, alone.disk, alone.link),
        load=load,
        start=machine.start,
        first_token=typical.prompt.total,
        streamed=streamed[0],
        more=more,
        warnings=tuple(_warnings(plan, work, question, streamed, ram_free)),
    )


def _speed(plan: Plan, sizes: Sizes, work: Work, machine: Machine, question: Question, routing: Routing) -> Speed:
    above, everywhere = cached_share(plan, work)
    batch, used = question.batch, routing.used(question.batch)
    hits = routing.rate(above, batch), routing.rate(everywhere, batch)
    streamed = streamed_bytes(plan, sizes.trunk)
    step = decode_seconds(work, machine, hits, streamed, question.prompt, batch, used)
    slot_bytes = plan.ram.expert_slots * sizes.expert
    # For the first prompt, all slots and activations are memory that has never been written.
    workspace = sizes.workspace * min(1.0, question.prompt / min(question.chunk, question.context))
    prompt = prefill_seconds(work, machine, 0.0, streamed, question.prompt, question.chunk, slot_bytes, workspace)
    return Speed(hits[1], used, batch / step.total, step, question.prompt / prompt.total, prompt)


def _serial(step: Seconds) -> float:
    return step.compute + step.overhead + step.disk + step.link


def _tiers(plan: Plan) -> list[TierPlan]:
    return [tier for tier in (plan.ram, plan.vram) if tier is not None]


def _warnings(plan: Plan, work: Work, question: Question, streamed: tuple[int, int], ram_free: int | None) -> list[str]:
    """Cliffs near this budget, in words."""
    found = []
    if streamed[0]:
        found.append(
            f"trunks of {format_size(streamed[0])} do not fit and are read again for every token: more ram helps this "
            "first"
        )
    token = work.moe_layers * work.experts_per_token
    slots = sum(tier.expert_slots for tier in _tiers(plan))
    if slots < token:
        found.append(
            f"{slots} expert slots are fewer than the {token} experts of one token: most are evicted before the next "
            "token needs them"
        )
    if ram_free is not None and question.ram > OS_SHARE * ram_free:
        found.append(
            f"{format_size(ram_free)} are free here: a budget of {format_size(question.ram)} leaves less than a tenth "
            "for the system and other programs; the process may be killed or slow them down"
        )
    return found
