"""What is where in a loaded model at this moment."""

from __future__ import annotations

from dataclasses import dataclass

from tierlm.memory.slots import Entry
from tierlm.memory.ticket import State
from tierlm.memory.tiers import Tier
from tierlm.policies.residency import EntryState
from tierlm.runtime import Runtime
from tierlm.spec import ExpertKey

ABSENT, ARRIVING = "d", "a"  # of an expert: on disk only; on its way to a tier
LEGEND = {ABSENT: "disk", ARRIVING: "arriving", "r": "ram", "v": "vram"}
LETTERS = {name: letter for letter, name in LEGEND.items()}


@dataclass(frozen=True)
class Live:
    """A picture of the moment. ``running``, ``waiting``: sequences. ``kv_tokens``, ``kv_reserved``: of ``context``
    tokens of the KV cache, those that hold values, and those that are taken, with values or to be filled. ``kv_disk``:
    tokens whose KV values are on disk; None without ``kv_disk``.

    ``experts``: by layer, a letter for each expert, for the tier nearest to the computation that holds it: "v", vram;
    "r", ram; "a", none, but it is on its way; "d", none, so it is on the disk only.
    """

    running: int
    waiting: int
    kv_tokens: int
    kv_reserved: int
    context: int
    kv_disk: int | None
    experts: dict[int, str]


def look(runtime: Runtime) -> Live:
    """A picture of ``runtime``, from any thread. The engine goes on meanwhile, so parts of the picture may be a step
    apart."""
    runtime.transfer.collect()  # an idle engine collects nothing
    scheduler, spec = runtime.scheduler, runtime.catalog.spec
    running, waiting = scheduler.load
    held, reserved = scheduler.cache.usage
    experts = {layer: bytearray(ABSENT.encode() * spec.experts) for layer in spec.moe_layers}
    for tier in reversed(runtime.experts):
        _mark(tier, experts)
    rows = {layer: row.decode() for layer, row in experts.items()}
    stored = None if runtime.kv_disk is None else runtime.kv_disk.snapshot().tokens
    return Live(running, waiting, held, reserved, runtime.context, stored, rows)


def _mark(tier: Tier, experts: dict[int, bytearray]) -> None:
    """Enter what ``tier`` holds over what the tiers below hold."""
    here, arriving, absent = ord(LETTERS[tier.name]), ord(ARRIVING), ord(ABSENT)
    for entry in list(tier.entries.values()):  # copied by one call of a C function, which the engine cannot interrupt
        if isinstance(key := entry.key, ExpertKey):
            row = experts[key.layer]
            if entry.state is EntryState.RESIDENT or _has_arrived(entry):
                row[key.expert] = here
            elif entry.state is EntryState.LOADING and row[key.expert] == absent:
                row[key.expert] = arriving


def _has_arrived(entry: Entry) -> bool:
    """Whether the read of ``entry`` has ended, which the tier sees in its next call."""
    ticket = entry.ticket
    return ticket is not None and ticket.state is State.ARRIVED
