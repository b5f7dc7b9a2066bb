"""Which experts are used most, in this run and, faded, in earlier ones: the order of the next warm-up."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tierlm.files import read_regular, write_whole
from tierlm.spec import ExpertKey

VERSION = 1
REMEMBERED = 1000  # the most turns of a layer that earlier runs count for


class Heat:
    """Uses per expert and turns per layer."""

    def __init__(self) -> None:
        self.uses: Counter[ExpertKey] = Counter()
        self.turns: Counter[int] = Counter()

    def note(self, layer: int, needed: Iterable[ExpertKey]) -> None:
        """Count one turn of ``layer``, which used ``needed``."""
        self.turns[layer] += 1
        self.uses.update(needed)

    def share(self, key: ExpertKey) -> float:
        """The share of its layer's turns in which ``key`` was used."""
        return self.uses[key] / max(1, self.turns[key.layer])

    def hottest(self) -> list[ExpertKey]:
        """The used experts, hottest first."""
        return sorted(self.uses, key=lambda key: (-self.share(key), key))

    def write(self, file: Path) -> None:
        """Save as JSON. Raises OSError."""
        uses = [[*key, round(count, 3)] for key, count in sorted(self.uses.items())]
        write_whole(file, json.dumps({"version": VERSION, "turns": sorted(self.turns.items()), "uses": uses}))

    @classmethod
    def read(cls, file: Path, known: Iterable[ExpertKey]) -> Heat:
        """Load what ``write`` saved, faded; empty if the file is missing or invalid."""
        heat, keys = cls(), set(known)
        try:
            found: Any = json.loads(read_regular(file))
            if found["version"] == VERSION:
                turns = {int(layer): float(count) for layer, count in found["turns"]}
                fade = {layer: min(1.0, REMEMBERED / count) for layer, count in turns.items()}
                uses = {ExpertKey(int(at), int(e)): float(count) * fade[int(at)] for at, e, count in found["uses"]}
                if set(uses) <= keys and all(0 <= uses[key] <= turns[key.layer] < math.inf for key in uses):
                    heat.uses.update(uses)
                    heat.turns.update({layer: count * fade[layer] for layer, count in turns.items()})
        except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
            return cls()
        return heat
