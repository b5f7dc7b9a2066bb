"""Decisions shared by the engine and the simulator: eviction, prediction, residency and lookahead. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tierlm.errors import UsageError, shown
from tierlm.files import read_regular, write_whole
from tierlm.policies.cycle import Cycle
from tierlm.policies.echo import Echo
from tierlm.policies.eviction import Policy, TierInfo
from tierlm.policies.frequency import Gdsf, Lfu, LfuAgeing, LruK
from tierlm.policies.hazard import Hazard
from tierlm.policies.queues import Arc, S3Fifo, TwoQ
from tierlm.policies.recency import Clock, Fifo, LayerLru, Lru, Random, Sieve
from tierlm.policies.registry import lookup

POLICIES: dict[str, type[Policy]] = {
    "echo": Echo,
    "hazard": Hazard,
    "cycle": Cycle,
    "lru": Lru,
    "layer-lru": LayerLru,
    "lfu": Lfu,
    "lfu-ageing": LfuAgeing,
    "gdsf": Gdsf,
    "lru-k": LruK,
    "2q": TwoQ,
    "arc": Arc,
    "s3-fifo": S3Fifo,
    "sieve": Sieve,
    "clock": Clock,
    "fifo": Fifo,
    "random": Random,
}
DEFAULT = "echo"  # also known as "default"


def make_policy(name: str, info: TierInfo, **parameters: float) -> Policy:
    """A policy by name, by ``"module:Class"``, or from a ``.json`` file written by ``write_policy``; ``parameters``
    override those in the file. Raises UsageError for an unknown name, a bad file or a bad parameter."""
    if name.endswith(".json"):
        name, stored = _read(Path(name))
        parameters = {**stored, **parameters}
    kind = lookup("policy", DEFAULT if name == "default" else name, POLICIES, Policy)
    for parameter, value in parameters.items():
        _check(name, kind, parameter, value)
    return kind(info, **parameters)


def write_policy(file: Path, name: str, parameters: Mapping[str, float]) -> None:
    """Save a policy and its parameters for ``make_policy``. Raises OSError."""
    write_whole(file, json.dumps({"policy": name, "parameters": dict(parameters)}, indent=2) + "\n")


def _read(file: Path) -> tuple[str, dict[str, float]]:
    try:
        found: Any = json.loads(read_regular(file))
        name, parameters = found["policy"], found["parameters"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"policy file {file}: {error!r}; expected an object with policy and parameters") from error
    if not isinstance(name, str) or name.endswith(".json") or not isinstance(parameters, dict):
        raise UsageError(f"policy file {file}: expected the name of a policy and its parameters, found {shown(found)}")
    return name, parameters


def _check(name: str, kind: type[Policy], parameter: str, value: float) -> None:
    if parameter not in kind.tunable:
        known = ", ".join(kind.tunable) or "none"
        raise UsageError(f"policy {name}: unknown parameter {shown(parameter)}; known are {known}")
    low, high = kind.tunable[parameter]
    whole = isinstance(low, int) and isinstance(high, int)
    fits = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not fits or isinstance(value, bool) or not low <= value <= high:
        expected = f"{'an integer' if whole else 'a number'} from {low} to {high}"
        raise UsageError(f"policy {name}: parameter {parameter}: expected {expected}, found {shown(value)}")
