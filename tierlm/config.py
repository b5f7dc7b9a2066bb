"""The user's settings: budget, sampling, runtime options. Frozen, and validated on creation."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from tierlm.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_CONTEXT = 4096  # tokens, if the model allows as many
MAX_LOGPROBS = 100  # most likely tokens reported for each token
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(value: int | float | str, name: str = "size") -> int:
    """Parse a number of bytes or a string: ``"8GiB"``, ``"500 MB"``, ``"1.5g"`` (bare k, m, g, t are binary).

    Raises UsageError unless the size is finite and non-negative.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UsageError(f"{name}: expected bytes or a string such as '8GiB', found {value!r}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise UsageError(f"{name}: expected a size such as '8GiB', '500MB' or bytes, found {value!r}")
        number = float(match[1]) * _UNITS[match[2].lower()]
    else:
        number = value
    if not 0 <= number < 2**63:  # False for NaN too
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
    """The memory limits of the whole process, in bytes.

    ``ram`` covers everything in host memory: interpreter, torch, trunk, KV, staging and cache. "auto" takes four fifths
    of the memory that is free when the model loads, within memory cgroups. ``vram`` is the accelerator's memory;
    without an accelerator, a second slab in host memory on top of ``ram``. None: nine tenths of the accelerator's free
    memory; without one, no such tier.
    """

    ram: int | None
    vram: int | None

    def __init__(self, ram: int | float | str = "auto", vram: int | float | str | None = None):
        object.__setattr__(self, "ram", None if ram == "auto" else parse_size(ram, "budget ram"))
        object.__setattr__(self, "vram", None if vram is None else parse_size(vram, "budget vram"))


class Constraint(Protocol):
    """Decides which tokens one sequence may have next, such as those of a grammar."""

    def mask(self, ids: Sequence[int], /) -> Tensor | None:
        """The tokens that may follow ``ids``, the generated ones so far: bool [vocab]; None: all. At least one is
        allowed, and ``ids`` only grow from call to call. Raises UsageError to end the sequence."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stop conditions. ``temperature`` 0 is greedy. Each prompt restarts from ``seed``.

    ``repetition_penalty`` divides the logits of tokens in prompt and text, as in `transformers`. ``frequency_penalty``
    is subtracted for each time that a token is in the generated text, ``presence_penalty`` once, and ``logit_bias`` is
    added to the logits of its token ids, as in OpenAI's API.

    ``n``: samples of each prompt; sample i has the seed ``seed + i``. The prompt is computed once.
    ``logprobs``: how many of the most likely tokens to report for each token; 0: only the token itself.
    ``skip_special_tokens``: leave special tokens out of the text. ``constraint``: makes the constraint of a sequence.
    ``priority``: who goes first if not all requests fit the context; smaller is sooner, as in vLLM. A request of
    priority 1 waits as one of priority 0 that comes a minute later.
    """

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
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    n: int = 1
    logprobs: int | None = None
    skip_special_tokens: bool = True
    constraint: Callable[[], Constraint] | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            _require(isinstance(getattr(self, name), Sequence), name, "a sequence", self)
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        _check(self, _SAMPLING)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        last = (self.seed or 0) + self.n - 1
        _require(last < 2**64, "n", f"at most {2**64 - (self.seed or 0)} with the seed {self.seed}", self)

    def samples(self) -> list[SamplingParams]:
        """The parameters of each of the ``n`` samples."""
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n)]
        return [replace(self, n=1, seed=seed) for seed in seeds]


@dataclass(frozen=True)
class RuntimeOptions:
    """Runtime options. Only ``kv_dtype``, ``kv_format``, ``exact`` and ``prefill_chunk`` (by rounding) may change the
    tokens.

    ``kv_disk``, ``kv_folder``, ``kv_format``: KV values of requests with a ``keep`` are also stored on disk, for later
    requests and runs: at most how many bytes, where (None: in the user's cache folder), and as they are ("exact") or
    rounded to "int8".

    ``ram_slots``, ``vram_slots`` and ``resident_trunks`` limit the expert slots and resident trunks of a tier below
    what the budget allows, for experiments.
    """

    device: str = "auto"
    policy: str = "default"
    predictor: str = "gate"
    speculation: str = "off"  # drafts verified where it pays: from the text so far ("lookup"), or the model's ("mtp")
    reader: str = "auto"
    context: int | None = None  # tokens of KV reserved for all sequences of a batch; None: min(model's own, 4096)
    prefill_chunk: int = 512
    logits_tokens: int | None = None  # tokens to reserve the result of a call for logits for; None: up to 64 MiB
    kv_dtype: str = "auto"  # of the KV cache; auto: bfloat16 where products round activations to int8, else float32
    kv_disk: int | float | str | None = None
    kv_folder: str | Path | None = None
    kv_format: str = "exact"
    threads: int | None = None  # of the kernels and torch; None: torch's, at most one a core (processors.py)
    exact: bool = False  # never round activations to int8, in products with quantised weights: slower
    transfer_threads: int | None = None  # concurrent reads; None: chosen for the disk
    probe: str = "auto"  # "auto": measure a disk at its first use; "refresh": measure again; "off": use defaults
    mirrors: Sequence[str | Path] = ()  # folders with copies of the model's files, on other disks
    heat: bool = True  # remember the most used experts, and warm up with them next time
    timeline: str | Path | None = None  # file for a timeline of events, written on close
    trace: str | Path | None = None  # file for the routers' choices, written on close
    trace_scores: bool = False  # also trace the routers' scores and predictions
    io_timeout: float = 60.0  # seconds without a finished read before a demand fails
    ram_slots: int | None = None
    vram_slots: int | None = None
    resident_trunks: int | None = None

    def __post_init__(self) -> None:
        _check(self, _OPTIONS)
        object.__setattr__(self, "mirrors", tuple(self.mirrors))
        _require(self.trace is not None or not self.trace_scores, "trace_scores", "False without a trace", self)
        if self.kv_disk is None:
            _require(self.kv_folder is None, "kv_folder", "None without kv_disk", self)
            _require(self.kv_format == "exact", "kv_format", "exact without kv_disk", self)
        else:
            object.__setattr__(self, "kv_disk", parse_size(self.kv_disk, "kv_disk"))


class LoadOptions(TypedDict, total=False):
    """The fields of ``RuntimeOptions`` as keywords of ``LLM.load``, for editors and type checkers."""

    device: str
    policy: str
    predictor: str
    speculation: str
    reader: str
    context: int | None
    prefill_chunk: int
    logits_tokens: int | None
    kv_dtype: str
    kv_disk: int | float | str | None
    kv_folder: str | Path | None
    kv_format: str
    threads: int | None
    exact: bool
    transfer_threads: int | None
    probe: str
    mirrors: Sequence[str | Path]
    heat: bool
    timeline: str | Path | None
    trace: str | Path | None
    trace_scores: bool
    io_timeout: float
    ram_slots: int | None
    vram_slots: int | None
    resident_trunks: int | None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_bias(value: Mapping[object, object]) -> bool:
    ids = all(_is_int(token) and token >= 0 for token in value)  # type: ignore[operator]
    return ids and all(_finite(bias) and -100 <= bias <= 100 for bias in value.values())  # type: ignore[operator]


def _is_path(value: object) -> bool:
    return isinstance(value, (str, Path)) and bool(str(value))


# Names of fields, the expected value in words, the predicate.
_Checks = tuple[tuple[str, str, Callable[[Any], bool]], ...]
_SAMPLING: _Checks = (
    ("max_new_tokens", "an integer >= 1", lambda v: _is_int(v) and v >= 1),
    ("temperature", "a number >= 0", lambda v: _finite(v) and v >= 0),
    ("top_k", "an integer >= 0 (0 is off)", lambda v: _is_int(v) and v >= 0),
    ("top_p", "a number in (0, 1]", lambda v: _finite(v) and 0 < v <= 1),
    ("min_p", "a number in [0, 1)", lambda v: _finite(v) and 0 <= v < 1),
    ("repetition_penalty", "a number > 0", lambda v: _finite(v) and v > 0),
    ("seed", "a 64-bit integer or None", lambda v: v is None or (_is_int(v) and -(2**63) <= v < 2**64)),
    ("stop", "non-empty strings", lambda v: all(isinstance(text, str) and text for text in v)),
    ("stop_ids", "token ids", lambda v: all(_is_int(token) and token >= 0 for token in v)),
    ("ignore_eos skip_special_tokens", "True or False", lambda v: isinstance(v, bool)),
    ("constraint", "a callable or None", lambda v: v is None or callable(v)),
    ("frequency_penalty presence_penalty", "a number from -2 to 2", lambda v: _finite(v) and -2 <= v <= 2),
    ("logit_bias", "token ids with numbers from -100 to 100", lambda v: isinstance(v, Mapping) and _is_bias(v)),
    ("n", "an integer >= 1", lambda v: _is_int(v) and v >= 1),
    ("priority", "an integer from -100 to 100", lambda v: _is_int(v) and -100 <= v <= 100),
    ("logprobs", f"0 to {MAX_LOGPROBS} or None", lambda v: v is None or (_is_int(v) and 0 <= v <= MAX_LOGPROBS)),
)
_OPTIONS: _Checks = (
    ("device policy predictor", "a name", lambda v: isinstance(v, str)),
    ("reader", "auto, direct or mmap", ("auto", "direct", "mmap").__contains__),
    ("speculation", "off, lookup or mtp", ("off", "lookup", "mtp").__contains__),
    ("probe", "auto, refresh or off", ("auto", "refresh", "off").__contains__),
    ("kv_dtype", "auto, float32 or bfloat16", ("auto", "float32", "bfloat16").__contains__),
    ("kv_format", "exact or int8", ("exact", "int8").__contains__),
    ("exact heat trace_scores", "True or False", lambda v: isinstance(v, bool)),
    ("prefill_chunk", "an integer >= 1", lambda v: _is_int(v) and v >= 1),
    (
        "context logits_tokens ram_slots vram_slots",
        "an integer >= 1 or None",
        lambda v: v is None or (_is_int(v) and v >= 1),
    ),
    ("resident_trunks", "an integer >= 0 or None", lambda v: v is None or (_is_int(v) and v >= 0)),
    ("threads transfer_threads", "1 to 256 or None", lambda v: v is None or (_is_int(v) and 1 <= v <= 256)),
    ("io_timeout", "seconds > 0", lambda v: _finite(v) and v > 0),
    ("kv_folder", "a folder or None", lambda v: v is None or _is_path(v)),
    ("timeline trace", "a file name or None", lambda v: v is None or _is_path(v)),
    (
        "mirrors",
        "a sequence of folders",
        lambda v: isinstance(v, Sequence) and not isinstance(v, str) and all(map(_is_path, v)),
    ),
)


def _check(owner: object, checks: _Checks) -> None:
    for names, expected, holds in checks:
        for name in names.split():
            _require(holds(getattr(owner, name)), name, expected, owner)


def _require(holds: bool, field: str, expected: str, owner: object) -> None:
    if not holds:
        raise UsageError(f"{field}: expected {expected}, found {getattr(owner, field)!r}")
