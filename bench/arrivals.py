"""When requests come, and how long they are: drawn with a seed, or from published traces of services.

Two forms of trace files are read from a path, and none is shipped:

- Azure's LLM inference dataset 2023 (github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_*.csv): a header, then
  ``TIMESTAMP,ContextTokens,GeneratedTokens``, times as ``2023-11-16 18:15:46.6805900``.
- Mooncake's traces (github.com/kvcache-ai/Mooncake, JSON lines): ``timestamp`` in milliseconds, ``input_length``,
  ``output_length``, and ``hash_ids``: a number for each block of 512 tokens of the prompt, equal for equal beginnings.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

BLOCK = 512  # tokens of a hash of Mooncake's


@dataclass(frozen=True)
class Arrival:
    """A request. ``at``: seconds from the start. ``prompt``, ``output``: tokens. ``blocks``: hashes of the prompt's
    blocks, if known."""

    at: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()

    def ids(self, number: int, ids: range) -> list[int]:
        """A prompt of its length from ``ids``, seeded by its blocks, or by ``number`` where they are not known."""
        found: list[int] = []
        while len(found) < self.prompt:
            at = len(found) // BLOCK
            chance = random.Random(self.blocks[at] if at < len(self.blocks) else f"{number} {at}")
            found += chance.choices(ids, k=min(BLOCK, self.prompt - len(found)))
        return found


def poisson(rate: float, seconds: float, prompt: int, output: int, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process of ``rate`` a second. Lengths are log-normal around the medians ``prompt`` and
    ``output`` (sigma 0.5), as those of real services are skewed."""
    chance, at, found = random.Random(seed), 0.0, list[Arrival]()
    while (at := at + chance.expovariate(rate)) < seconds:
        lengths = (max(1, round(chance.lognormvariate(math.log(median), 0.5))) for median in (prompt, output))
        found.append(Arrival(at, *lengths))
    return found


def read_arrivals(file: Path) -> list[Arrival]:
    """The requests of a trace file, by time, the first at 0. Raises ValueError with the line of the error."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        found = sorted(_mooncake(stream) if file.suffix == ".jsonl" else _azure(stream), key=lambda one: one.at)
    if not found:
        raise ValueError(f"{file}: expected requests, found none")
    return [replace(one, at=one.at - found[0].at) for one in found]


def fitted(arrivals: Iterable[Arrival], speed: float, seconds: float, prompt: int, output: int) -> list[Arrival]:
    """``arrivals`` in ``speed`` times shorter time, of the first ``seconds`` of that, no longer than ``prompt`` and
    ``output`` tokens."""
    cut = (
        replace(one, at=one.at / speed, prompt=min(one.prompt, prompt), output=min(one.output, output))
        for one in arrivals
    )
    return [one for one in cut if one.at < seconds]


def _azure(lines: Iterable[str]) -> Iterator[Arrival]:
    rows = csv.DictReader(lines)
    for row in rows:
        try:
            moment = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()  # its 7th digit is below a microsecond
            yield Arrival(moment, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (KeyError, ValueError, TypeError) as error:
            expected = "TIMESTAMP,ContextTokens,GeneratedTokens"
            raise ValueError(f"line {rows.line_num}: expected {expected}, found {row}: {error!r}") from error


def _mooncake(lines: Iterable[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            blocks = tuple(int(block) for block in row.get("hash_ids", ()))
            yield Arrival(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), blocks)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            expected = "timestamp, input_length, output_length"
            raise ValueError(f"line {number}: expected {expected}, found {line.strip()[:100]}: {error!r}") from error
