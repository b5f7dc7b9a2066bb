"""What the user asks for: a budget, how to sample, how to run. Frozen, validated where they are made."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tierlm.errors import UsageError

DEFAULT_CONTEXT = 4096  # tokens, of a model that has more
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(value: int | float | str, name: str = "size") -> int:
    """Bytes from a number of bytes or a text such as ``"8GiB"``, ``"500 MB"``, ``"1.5g"`` (bare k, m, g, t are binary).

    Raises UsageError for anything that is not a finite, non-negative amount.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UsageError(f"{name}: expected bytes or a text such as '8GiB', found {value!r}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise UsageError(f"{name}: expected a size such as '8GiB', '500MB' or bytes, found {value!r}")
        number = float(match[1]) * _UNITS[match[2].lower()]
    else:
        number = value
    if not 0 <= number < 2**63:  # not a number compares as false too
        raise UsageError(f"{name}: expected a finite size of at least 0 bytes, found {value!r}")
    return int(number)


def format_size(size: float) -> str:
    """A size for people: ``"1.50 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


@dataclass(frozen=True, init=False)
class Budget:
    """What the whole process may use, in bytes.

    ``ram`` counts everything in host memory: interpreter, torch, trunk, KV, staging and cache. "auto" means four
    fifths of what is free when the model loads, memory cgroups included. ``vram`` is the accelerator's; without an
    accelerator it is a second slab in host memory that plays one, on top of ``ram``. None: no such tier, unless the
    machine has an accelerator, of which nine tenths of the free memory are then used.
    """

    ram: int | None
    vram: int | None

    def __init__(self, ram: int | float | str = "auto", vram: int | float | str | None = None):
        object.__setattr__(self, "ram", None if ram == "auto" else parse_size(ram, "budget ram"))
        object.__setattr__(self, "vram", None if vram is None else parse_size(vram, "budget vram"))


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop. ``temperature`` 0 is greedy; the seed is each prompt's own."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] | Sequence[str] | str = ()
    stop_ids: tuple[int, ...] | Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            _require(isinstance(getattr(self, name), Sequence), name, "a sequence", self)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        _require(_is_int(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", "an integer >= 1", self)
        _require(_finite(self.temperature) and self.temperature >= 0, "temperature", "a number >= 0", self)
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", "an integer >= 0 (0 is off)", self)
        _require(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1]", self)
        _require(_finite(self.min_p) and 0 <= self.min_p < 1, "min_p", "a number in [0, 1)", self)
        _require(
            _finite(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty", "a number > 0", self
        )
        seed_fits = self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**64)
        _require(seed_fits, "seed", "an integer of 64 bits or None", self)
        _require(all(isinstance(s, str) and s for s in stop), "stop", "texts of at least one character", self)
        _require(all(_is_int(i) and i >= 0 for i in self.stop_ids), "stop_ids", "token ids", self)


@dataclass(frozen=True)
class RuntimeOptions:
    """How to run. The defaults are right for most; none of them changes the tokens except ``prefill_chunk``,
    whose effect is of rounding only, ``kv_dtype`` and ``exact``.

    ``ram_slots``, ``vram_slots`` and ``resident_trunks`` hold the number of expert slots, and of trunks that stay in a
    tier, at or below what the budget allows: for experiments.
    """

    device: str = "auto"
    policy: str = "default"
    predictor: str = "gate"
    reader: str = "auto"
    context: int | None = None  # tokens of KV reserved, over all running sequences; None: min(model's own, 4096)
    prefill_chunk: int = 512
    kv_dtype: str = "float32"
    exact: bool = False  # int8 and int4 weights times activations in float32, not rounded to int8: slower
    transfer_threads: int | None = None  # reads at a time; None: as many as the disk likes
    probe: str = "auto"  # of a disk at its first use; "refresh": measure again; "off": take what suits most
    mirrors: Sequence[str | Path] = ()  # folders with copies of the model's files, on other disks
    heat: bool = True  # remember which experts are used most, and load those in the background the next time
    timeline: str | Path | None = None  # a file for a trace of events, written when the model is closed
    trace: str | Path | None = None  # a file for what the routers choose, written when the model is closed
    trace_scores: bool = False  # with the routers' scores and the guesses of gates
    io_timeout: float = 60.0  # seconds without a finished read before a demand gives up
    ram_slots: int | None = None
    vram_slots: int | None = None
    resident_trunks: int | None = None

    def __post_init__(self) -> None:
        for name in ("device", "policy", "predictor"):
            _require(isinstance(getattr(self, name), str), name, "a name", self)
        several = isinstance(self.mirrors, Sequence) and not isinstance(self.mirrors, str)
        named = several and all(isinstance(folder, (str, Path)) and str(folder) for folder in self.mirrors)
        _require(named, "mirrors", "a sequence of folders", self)
        object.__setattr__(self, "mirrors", tuple(self.mirrors))
        for name in ("heat", "exact"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", self)
        for name in ("timeline", "trace"):
            value = getattr(self, name)
            named = value is None or (isinstance(value, (str, Path)) and bool(str(value)))
            _require(named, name, "a file name or None", self)
        scores = isinstance(self.trace_scores, bool) and (self.trace is not None or not self.trace_scores)
        _require(scores, "trace_scores", "True or False, and True only with a trace", self)
        _require(self.reader in ("auto", "direct", "mmap"), "reader", "auto, direct or mmap", self)
        _require(self.kv_dtype in ("float32", "bfloat16"), "kv_dtype", "float32 or bfloat16", self)
        _require(_is_int(self.prefill_chunk) and self.prefill_chunk >= 1, "prefill_chunk", "an integer >= 1", self)
        _require(self.probe in ("auto", "refresh", "off"), "probe", "auto, refresh or off", self)
        threads = self.transfer_threads
        fits = threads is None or (_is_int(threads) and 1 <= threads <= 256)
        _require(fits, "transfer_threads", "1 to 256 or None", self)
        _require(_finite(self.io_timeout) and self.io_timeout > 0, "io_timeout", "seconds > 0", self)
        for name in ("context", "ram_slots", "vram_slots"):
            value = getattr(self, name)
            _require(value is None or (_is_int(value) and value >= 1), name, "an integer >= 1 or None", self)
        value = self.resident_trunks
        _require(value is None or (_is_int(value) and value >= 0), "resident_trunks", "an integer >= 0 or None", self)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _require(holds: bool, field: str, expected: str, owner: object) -> None:
    if not holds:
        raise UsageError(f"{field}: expected {expected}, found {getattr(owner, field)!r}")
