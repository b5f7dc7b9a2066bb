"""``tierlm profile``: capacity and bandwidth of every tier of this machine."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text
from typer import Option

from tierlm.cli.options import Json, Quiet
from tierlm.cli.output import STDOUT, report, writing
from tierlm.cli.overhead import engine_seconds, start_seconds
from tierlm.config import format_size
from tierlm.errors import UsageError

if TYPE_CHECKING:
    from tierlm.profiling.profile import Profile, Spread

DISK_SECONDS = 24.0  # over all paths
TORCH = 480 * 2**20  # bytes of torch, the weights to measure with and the embedded model


def profile(
    path: Annotated[
        list[Path] | None,
        Option("--path", metavar="FOLDER", help="On a disk to measure; repeatable; default: this folder."),
    ] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Plot bandwidth against capacity.")] = None,
    model: Annotated[str, Option(metavar="NAME", help="The model of the plot's lines of tokens/s.")] = "DeepSeek-V3",
    format: Annotated[str | None, Option(metavar="NAME", help="Its format; default: as published.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure caches, RAM, disks, kernels and an accelerator in less than a minute. `tierlm plan` uses the result.

    Large files of a folder are read in place. If there are none, a temporary file is written.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from tierlm.profiling.profile import default_file

    paths = path or [Path()]
    for file in filter(None, (None if json == STDOUT else json, plot)):
        if not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: cannot be written: {file.absolute().parent} is not a folder")
        with writing(file):  # fail now rather than after the measurements
            tempfile.TemporaryFile(dir=file.absolute().parent).close()
    for folder in paths:
        if not folder.is_dir():
            raise UsageError(f"{folder}: expected a folder on the disk to measure")
    console = Console(stderr=True)
    columns = (TextColumn("measuring {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def step(what: str, total: int) -> Callable[[], None]:
            bar.update(task, description=what, total=total, completed=0)
            return lambda: bar.advance(task)

        found = _measure([folder.resolve() for folder in paths], step)
    remembered = default_file()
    if not found.disks:  # it would replace a profile that has disks
        console.print("not remembered: no disk was measured")
    elif remembered is not None:
        try:
            found.write(remembered)
        except OSError as error:
            console.print(f"not remembered: {remembered}: {error.strerror}")
    report(dataclasses.asdict(found), json, *_tables(found))
    if plot is not None:
        from tierlm.models.outline import Outline, work_of
        from tierlm.planning.known import find_config
        from tierlm.profiling.picture import draw

        named = find_config(model)
        outline = Outline(named.config, named.where, format)
        draw(plot, found, f"{named.name} {outline.format}", work_of(outline), outline.used_bytes)
    if not found.disks:
        raise typer.Exit(1)


def _measure(paths: list[Path], step: Callable[[str, int], Callable[[], None]]) -> Profile:
    from tierlm.errors import TierlmError
    from tierlm.host import available_ram, total_ram
    from tierlm.profiling.bandwidth import measure_memory, measure_touch
    from tierlm.profiling.profile import DiskRate, Profile
    from tierlm.profiling.storage import ROUNDS, cells, files_of, measure_disk

    missing: list[str] = []
    memory = measure_memory(step("caches and RAM", 4))
    disks: list[DiskRate] = []
    capacity: dict[str, int] = {}
    wanted = cells()
    for folder in paths:
        done = step(str(folder), ROUNDS * len(wanted))
        try:
            disks += measure_disk(folder, wanted, DISK_SECONDS / len(paths), done)
            capacity[str(folder)] = shutil.disk_usage(folder).total
        except TierlmError as error:
            missing.append(str(error))
    touch = measure_touch()  # after some seconds without freeing a large block
    measured = Profile(
        when=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        ram=total_ram(),
        ram_limit=available_ram(),
        memory=memory,
        disks=disks,
        disk_capacity=capacity,
        touch=touch,
        missing=missing,
    )
    if (free := available_ram()) < TORCH:
        missing.append(
            f"kernels, cards and the engine: {format_size(free)} of RAM are free, torch needs {format_size(TORCH)}"
        )
        return measured
    from tierlm.profiling.arithmetic import (
        MANY,
        MEASURED,
        ROWS,
        measure_beside,
        measure_kernels,
        measure_links,
        measure_unpacking,
    )

    kernels = measure_kernels(step("kernels", len(MEASURED) * len(ROWS)))
    done = step("side by side", 5)
    beside = beside_many = None
    for rate in [rate for rate in disks if rate.reader == "direct" and not rate.from_ram][:1]:
        with files_of(Path(rate.path)) as files:
            beside, beside_many = (measure_beside(files, rows) for rows in (1, MANY))
    done()
    links, device_memory = measure_links()
    done()
    unpack = measure_unpacking()
    done()
    if not unpack:
        missing.append("decompression: the package zstandard is not installed")
    if not links:
        missing.append("links to a device: no accelerator")
    layer, record = engine_seconds()
    done()
    return dataclasses.replace(
        measured,
        kernels=kernels,
        links=links,
        device_memory=device_memory,
        unpack=unpack,
        beside=beside,
        beside_many=beside_many,
        layer=layer,
        record=record,
        start=start_seconds(),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _tables(found: Profile) -> Iterator[RenderableType]:
    free = f"{format_size(found.ram)}, {format_size(found.ram_limit)} of it free"
    title = f"{found.processor}, {found.cores} cores, {free}"
    memory = Table("", "read GB/s", "write GB/s", "copy GB/s", title=title, title_justify="left", box=None)
    several = len({rate.node for rate in found.memory}) > 1
    for rate in found.memory:
        what = f"{rate.name} {format_size(rate.capacity)}" if rate.capacity else rate.name
        what += f", {rate.threads} core" + "s" * (rate.threads > 1)
        what += f", node {rate.cpus} on node {rate.node}" if several else ""
        memory.add_row(what, *map(_gb, (rate.read, rate.write, rate.copy)))
    for name, speed in {**found.links, **found.unpack}.items():
        memory.add_row(name, _gb(speed))
    yield memory
    for path in dict.fromkeys(rate.path for rate in found.disks):
        yield _disk_table(found, path)
        for disk in found.disks:
            if disk.path == path and (disk.pattern, disk.reader) != ("random", "direct"):
                label = f"; from RAM: {disk.from_ram}" if disk.from_ram else ""
                what = f" {disk.reader} {disk.pattern} {format_size(disk.request_bytes)} x {disk.depth}"
                yield Text(f"{what}: {_gb(disk.rate)} GB/s{label}", style="yellow" if label else "")
    rows = [f"{count} row" + "s" * (count > 1) for count in sorted({rate.rows for rate in found.kernels})]
    kernels = Table("", *rows, title="kernels, G multiply-adds/s", title_justify="left", box=None)
    for name in dict.fromkeys(rate.format for rate in found.kernels):
        kernels.add_row(name, *(_gb(rate.rate) for rate in found.kernels if rate.format == name))
    yield kernels
    for what, shares in (("one row's", found.beside), ("many rows'", found.beside_many)):
        if shares is not None:
            kept = f"keeps {shares[0]:.0%} of its speed, the disk {shares[1]:.0%}"
            yield f" together {what} arithmetic {kept}"
    if found.touch is not None:
        huge, ordinary = (1e9 * seconds for seconds in found.touch)
        yield f" first touch of memory {huge:.2f} s/GB in huge pages, {ordinary:.2f} in ordinary pages"
    if found.layer is not None and found.record is not None:
        yield (
            f" engine overhead {1e3 * found.layer:.2f} ms per layer of a decode step, "
            f"{1e3 * found.record:.2f} ms per expert of a prefill"
        )
    for what in found.missing:
        yield f" [yellow]not measured[/yellow] {what}"


def _disk_table(found: Profile, path: str) -> Table:
    cells = [r for r in found.disks if r.path == path and (r.pattern, r.reader) == ("random", "direct")]
    device = next(rate.device for rate in found.disks if rate.path == path)
    counted = [rate.device_share for rate in cells if rate.device_share is not None and not rate.from_ram]
    proof = f"the device delivered {min(counted):.0%} or more of the bytes" if counted else "no device counter"
    title = f"{path}: {device}; random direct reads, GB/s (median ms); {proof}"
    depths = sorted({rate.depth for rate in cells})
    table = Table(
        "size x depth", *(Column(str(depth), justify="right") for depth in depths), title=title, title_justify="left"
    )
    shown = {
        (rate.request_bytes, rate.depth): f"{rate.rate.median / 1e9:.2f}{'*' if rate.from_ram else ''} "
        f"({1e3 * rate.percentiles[0]:.1f})"
        for rate in cells
    }
    for size in sorted({rate.request_bytes for rate in cells}):
        table.add_row(format_size(size), *(shown.get((size, depth), "") for depth in depths))
    if any(rate.from_ram for rate in cells):
        table.caption = "* " + next(rate.from_ram for rate in cells if rate.from_ram)
    return table


def _gb(speed: Spread) -> str:
    return f"{speed.median / 1e9:.2f} [{speed.low / 1e9:.2f}-{speed.high / 1e9:.2f}]"
