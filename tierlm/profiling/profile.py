"""A machine's measured rates, stored as JSON, and the rates that the cost model derives from them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tierlm.errors import UsageError, shown
from tierlm.files import read_regular, user_cache, write_whole
from tierlm.formats import FORMATS
from tierlm.planning.cost import Accelerator, Machine

VERSION = 2
MOST = 1e24  # of any number in a profile
ENGINE_SIZES = tuple(size * 2**20 for size in (1, 4, 8))  # bytes of a request, like the choices of checkpoints/probe.py
ENGINE_DEPTHS = (4, 8, 16)

# Without a measurement: a desktop with two memory channels and a PCIe 3.0 NVMe disk.
ASSUMED_DISK, ASSUMED_LATENCY = 3e9, 1e-3
ASSUMED_WEIGHT_BYTES = 20e9  # bytes of weights a second for one row: half of the memory bandwidth
ASSUMED_PRODUCTS = 15e9  # multiply-adds a second per core of a large float32 product: a third of AVX2's peak
ASSUMED_BESIDE = (0.8, 0.8)
ASSUMED_LAYER, ASSUMED_RECORD, ASSUMED_TOUCH, ASSUMED_START = 1e-3, 3e-4, (0.5e-9, 1e-9), 3.0
LIKE_BF16 = "bf16's, by the bytes of a weight"


@dataclass(frozen=True)
class Spread:
    """Several rounds, in bytes or operations a second."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class MemoryRate:
    """A cache or a node's RAM: ``capacity`` in bytes, rates of ``threads`` cores of the node ``cpus`` on memory of the
    node ``node``. A copy counts both reads and writes."""

    name: str
    capacity: int
    cpus: int
    node: int
    threads: int
    read: Spread
    write: Spread
    copy: Spread


@dataclass(frozen=True)
class DiskRate:
    """``depth`` concurrent reads of ``request_bytes``. ``percentiles``: seconds of a read, 50, 90 and 99 %.

    ``device_share``: bytes counted by the block device / bytes read; None without a counter. ``from_ram``: why the
    rate is not the disk's, or "".
    """

    path: str
    device: str
    reader: str  # direct | mmap
    pattern: str  # random | sequential
    request_bytes: int
    depth: int
    rate: Spread
    percentiles: tuple[float, float, float]
    device_share: float | None
    from_ram: str = ""


@dataclass(frozen=True)
class KernelRate:
    """Gated MLPs with weights outside any cache: multiply-adds a second with ``rows`` rows."""

    format: str
    rows: int
    threads: int
    rate: Spread

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"expected at least one row, found {self.rows}")


@dataclass(frozen=True)
class Profile:
    """All measurements. Rates in bytes a second, capacities in bytes. ``disk_capacity``: by path.

    ``beside``: shares of their own speed that arithmetic with one row and the disk keep when they run together;
    ``beside_many``: with the rows of a prefill. ``links``: host to device and back, pinned and pageable, and the
    device's memory and products, by name. ``unpack``: decompressed bytes a second. ``layer``, ``record``, ``touch``,
    ``start``: see Machine. ``missing``: what was not measured, and why.
    """

    when: str
    processor: str
    cores: int
    ram: int
    ram_limit: int  # available to this process
    memory: Sequence[MemoryRate] = ()
    disks: Sequence[DiskRate] = ()
    disk_capacity: Mapping[str, int] = field(default_factory=dict)
    kernels: Sequence[KernelRate] = ()
    links: Mapping[str, Spread] = field(default_factory=dict)
    device_memory: int = 0
    unpack: Mapping[str, Spread] = field(default_factory=dict)
    beside: tuple[float, float] | None = None
    beside_many: tuple[float, float] | None = None
    layer: float | None = None
    record: float | None = None
    touch: tuple[float, float] | None = None
    start: float | None = None
    missing: Sequence[str] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.cores < 1 or min(self.beside or (1,)) <= 0 or min(self.beside_many or (1,)) <= 0:
            raise ValueError(
                f"expected cores and shares above 0, found {self.cores}, {self.beside}, {self.beside_many}"
            )

    def write(self, file: Path) -> None:
        """Write it as JSON. Raises OSError."""
        write_whole(file, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def engine_disk(self) -> tuple[float, float] | None:
        """Bytes a second and latency in seconds of the fastest disk as the engine reads it: the median over random
        direct reads of ENGINE_SIZES at ENGINE_DEPTHS (the best sample would be luck), and a single read. None if no
        disk was measured without the page cache."""
        found: list[tuple[float, float]] = []
        for path in self.disk_capacity:
            real = [r for r in self.disks if r.path == path and r.pattern == "random" and not r.from_ram]
            direct = [rate for rate in real if rate.reader == "direct"] or real
            sized = [rate for rate in direct if rate.request_bytes in ENGINE_SIZES] or direct
            usual = [rate for rate in sized if rate.depth in ENGINE_DEPTHS] or sized
            if usual:
                alone = min(sized, key=lambda rate: (rate.depth, rate.request_bytes))
                found.append((spread([rate.rate.median for rate in usual]).median, alone.percentiles[0]))
        return max(found, default=None)


def default_file() -> Path | None:
    """The file through which ``tierlm profile`` passes its result to ``tierlm plan``; None without a cache folder."""
    cache = user_cache()
    return None if cache is None else cache / "profile.json"


def read_profile(file: Path) -> Profile:
    """Read a file written by ``Profile.write``. Raises UsageError."""
    try:
        found = json.loads(read_regular(file))
        if found.get("version") != VERSION:
            raise ValueError(f"version {shown(found.get('version'))}, expected {VERSION}")
        profile: Profile = _typed(Profile, found)
        return profile
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file}: expected a file from `tierlm profile --json`, found: {error}") from error


def machine_of(profile: Profile | None, vram: bool) -> Machine:
    """The rates of ``profile``, with assumptions for missing ones; None: assumptions only.

    ``vram``: whether a card computes. ``origins`` lists a format's rate under its name.
    """
    origins: dict[str, str] = {}
    measured = "measured" if profile is None else f"measured {profile.when}"

    def known(name: str, value: Any, otherwise: Any) -> Any:
        origins[name] = "assumed" if value is None else measured
        return otherwise if value is None else value

    disk = None if profile is None else profile.engine_disk()
    cores = profile.cores if profile is not None else len(os.sched_getaffinity(0))
    rates: dict[str, dict[int, float]] = {}
    for kernel in () if profile is None else profile.kernels:
        rates.setdefault(kernel.format, {})[kernel.rows] = kernel.rate.median
    like = rates.get("bf16")
    weights, products = {}, {}
    for format, kind in FORMATS.items():
        by_rows = rates.get(format)
        if by_rows is not None:
            weights[format], origins[format] = by_rows[min(by_rows)], measured
        elif like is not None:
            weights[format], origins[format] = like[min(like)] * FORMATS["bf16"].bits / kind.bits, LIKE_BF16
        else:
            weights[format], origins[format] = ASSUMED_WEIGHT_BYTES * 8 / kind.bits, "assumed"
        # More rows are never slower than one.
        by_rows = by_rows or like or {64: ASSUMED_PRODUCTS * cores}
        products[format] = {rows: max(rate, weights[format]) for rows, rate in by_rows.items()}
    return Machine(
        disk=known("disk", disk and disk[0], ASSUMED_DISK),
        latency=known("latency", disk and disk[1], ASSUMED_LATENCY),
        weights=weights,
        products=products,
        beside=known("beside", profile and profile.beside, ASSUMED_BESIDE),
        beside_many=known("beside_many", profile and profile.beside_many, ASSUMED_BESIDE),
        layer=known("layer", profile and profile.layer, ASSUMED_LAYER),
        record=known("record", profile and profile.record, ASSUMED_RECORD),
        touch=known("touch", profile and profile.touch, ASSUMED_TOUCH),
        start=known("start", profile and profile.start, ASSUMED_START),
        accelerator=_accelerator(profile, origins) if vram else None,
        origins=origins,
    )


def _accelerator(profile: Profile | None, origins: dict[str, str]) -> Accelerator | None:
    """The card of a profile; without one, assumed mid-range hardware."""
    links = {} if profile is None else profile.links
    if "pinned to device" in links and "device memory" in links and "device products" in links:
        origins["accelerator"] = "measured"
        return Accelerator(*(links[name].median for name in ("device memory", "pinned to device", "device products")))
    origins["accelerator"] = "assumed: 400 GB/s, PCIe 4.0 x16"
    return Accelerator(memory=400e9, link=25e9, products=20e12)


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum and maximum."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Spread(median, ordered[0], ordered[-1])


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 50th, 90th and 99th percentiles."""
    ordered = sorted(seconds)
    at = [ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.9, 0.99)]
    return at[0], at[1], at[2]


def _typed(kind: Any, value: Any) -> Any:
    """A JSON value as ``kind``, the type of a field of Profile. Raises ValueError, TypeError."""
    parts = get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        found = kind(**{name: _typed(hints[name], part) for name, part in value.items() if name in hints})
        if isinstance(found, Spread) and min(found.median, found.low, found.high) <= 0:
            raise ValueError(f"expected rates above 0, found {found}")
        return found
    if type(None) in parts:
        return None if value is None else _typed(parts[0], value)
    origin = get_origin(kind)
    if origin is Mapping and isinstance(value, dict):
        return {name: _typed(parts[1], part) for name, part in value.items()}
    if origin is Sequence and isinstance(value, list):
        return [_typed(parts[0], part) for part in value]
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(part_kind, part) for part_kind, part in zip(parts, value, strict=True))
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and type(value) in (int, kind) and 0 <= value <= MOST:
        return kind(value)
    raise ValueError(f"expected {kind if parts else kind.__name__}, found {shown(value)}")
