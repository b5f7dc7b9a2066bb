"""Which experts are used most, over this run and, fading, the ones before: what to load first the next time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tierlm.files import write_whole
from tierlm.spec import ExpertKey

VERSION = 1
REMEMBERED = 1000  # turns of a layer that earlier runs count for at most


class Heat:
    """Uses of each expert, and turns of each layer."""

    def __init__(self) -> None:
        self.uses: Counter[ExpertKey] = Counter()
        self.turns: Counter[int] = Counter()

    def note(self, layer: int, needed: Iterable[ExpertKey]) -> None:
        """``layer`` has run once and used ``needed``."""
        self.turns[layer] += 1
        self.uses.update(needed)

    def share(self, key: ExpertKey) -> float:
        """The share of its layer's turns in which ``key`` was used."""
        return self.uses[key] / max(1, self.turns[key.layer])

    def hottest(self) -> list[ExpertKey]:
        """The experts that have been used, most often first."""
        return sorted(self.uses, key=lambda key: (-self.share(key), key))

    def write(self, file: Path) -> None:
        """Keep it in ``file``, as JSON. Raises OSError."""
        uses = [[*key, round(count, 3)] for key, count in sorted(self.uses.items())]
        write_whole(file, json.dumps({"version": VERSION, "turns": sorted(self.turns.items()), "uses": uses}))

    @classmethod
    def read(cls, file: Path, known: Iterable[ExpertKey]) -> Heat:
        """What ``write`` has kept, faded; of a file that is missing or makes no sense, nothing."""
        heat, keys = cls(), set(known)
        try:
            found: Any = json.loads(file.read_text(encoding="utf-8"))
            if found["version"] == VERSION:
                turns = {int(layer): float(count) for layer, count in found["turns"]}
                fade = {layer: min(1.0, REMEMBERED / count) for layer, count in turns.items()}
                uses = {ExpertKey(int(at), int(e)): float(count) * fade[int(at)] for at, e, count in found["uses"]}
                if set(uses) <= keys and all(0 <= count < float("inf") for count in uses.values()):
                    heat.uses.update(uses)
                    heat.turns.update({layer: count * fade[layer] for layer, count in turns.items()})
        except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError):
            return cls()
        return heat
