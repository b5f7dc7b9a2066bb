"""``tierlm plan``: what a budget will do for a model, before it is downloaded. ``profile`` and ``doctor`` measure and
look at the machine. None of them imports torch before it needs a kernel."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tierlm.config import format_size, parse_size
from tierlm.errors import UsageError

if TYPE_CHECKING:
    from tierlm.models.outline import Records
    from tierlm.planning.cost import Machine, Work
    from tierlm.planning.forecast import Forecast, Question
    from tierlm.planning.plan import Sizes
    from tierlm.spec import UnitKey

Model = Annotated[
    str, typer.Argument(help="A folder, a config.json, a hub id, 'demo', or a known model such as DeepSeek-V3.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
WIDTH = 116
ASSUMED_ROUTING = "as of trained models"


def plan(
    model: Model,
    ram: Annotated[str, typer.Option(help="Host memory for the whole process, such as 32GiB; auto: of this machine.")],
    vram: Annotated[str | None, typer.Option(help="Memory of the card that computes.")] = None,
    disk_bandwidth: Annotated[
        str | None, typer.Option(help="Of random reads, in bytes a second, such as 3.5GB.")
    ] = None,
    machine: Annotated[Path | None, typer.Option(help="What `tierlm profile --json` wrote, here or elsewhere.")] = None,
    format: Annotated[
        str | None, typer.Option(help="bf16, fp8, int8, int4, mxfp4 or q4_k_m; default: as published.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens to reserve; default: the model's, up to 4096.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that the first token waits for.")] = 512,
    trace: Annotated[Path | None, typer.Option(help="Recorded routing, instead of what is assumed of it.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a budget means for a model on a machine: bytes, slots, tokens a second. No weights are needed."""
    from tierlm.config import DEFAULT_CONTEXT, RuntimeOptions
    from tierlm.host import available_ram
    from tierlm.models.outline import sizes_of, work_of
    from tierlm.planning.forecast import Question, forecast
    from tierlm.planning.plan import AUTO_RAM

    name, records = _records(model, format)
    tokens = context or min(records.spec.max_position, DEFAULT_CONTEXT)
    if not 1 <= tokens <= records.spec.max_position:
        raise UsageError(f"context: expected 1 to the model's own {records.spec.max_position}, found {context}")
    if not 1 <= prompt <= tokens:
        raise UsageError(f"prompt: expected 1 to the context of {tokens} tokens, found {prompt}")
    options = RuntimeOptions(context=tokens)
    free = available_ram()
    question = Question(
        ram=int(free * AUTO_RAM) if ram == "auto" else parse_size(ram, "ram"),
        vram=None if vram is None else parse_size(vram, "vram"),
        context=tokens,
        prompt=prompt,
        chunk=options.prefill_chunk,
    )
    rates, source = _machine(machine, disk_bandwidth, question.vram is not None)
    sizes, work = sizes_of(records, tokens, options.prefill_chunk, 4), work_of(records)
    here = free if machine is None else None
    recorded, routing = _recorded(trace, work)
    found = forecast(sizes, work, rates, question, here, recorded)
    if as_json:
        shown = _as_json(name, records, sizes, work, question, rates, found)
        print(json.dumps(shown | {"routing": routing}, indent=1, default=str))
        return
    console = Console(width=max(WIDTH, Console().width), emoji=False)  # whose table takes its time
    console.print(_size_table(name, records, sizes, work, question))
    console.print(_plan_table(found, sizes))
    console.print(_speed_table(found, work, question, rates, source, routing))
    for warning in found.warnings:
        console.print(f"[yellow]note[/yellow] {warning}")


def _records(model: str, format: str | None) -> tuple[str, Records]:
    """The records of a model, exactly where its files are there and are to be used as they are."""
    from tierlm.models.catalog import Catalog
    from tierlm.models.outline import Outline
    from tierlm.planning.known import find_config

    named = find_config(model)
    if named.folder is not None and format is None:
        return named.name, Catalog(named.folder)
    return named.name, Outline(named.config, named.where, format)


def _format(records: Records) -> str:
    """In a word, or the experts' and the trunk's."""
    from tierlm.models.outline import Outline

    experts, trunk, _ = records.formats
    return records.format if isinstance(records, Outline) else experts if experts == trunk else f"{experts}/{trunk}"


def _recorded(file: Path | None, work: Work) -> tuple[Callable[[float], float] | None, str]:
    """The hit rates of a trace, if there is one, and what routing is expected, in words."""
    if file is None:
        return None, ASSUMED_ROUTING
    from tierlm.planning.recorded import RecordedHits
    from tierlm.tracing.traceforms import read_trace

    hits = RecordedHits(read_trace(file))
    return hits.rate, f"as recorded: {hits.describe(work)}"


def _machine(file: Path | None, bandwidth: str | None, card: bool) -> tuple[Machine, str]:
    """The rates to predict with, and where they are from in words."""
    from tierlm.profiling.profile import default_file, machine_of, read_profile

    remembered = default_file()
    profile, source = None, "assumed; `tierlm profile` measures this machine"
    if file is not None:
        profile, source = read_profile(file), str(file)
    elif remembered is not None and remembered.exists():
        profile, source = read_profile(remembered), "this machine's last `tierlm profile`"
    machine = machine_of(profile, card)
    if bandwidth is not None:
        given = parse_size(bandwidth, "disk bandwidth")
        if not given:
            raise UsageError("disk bandwidth: expected more than nothing")
        machine = dataclasses.replace(machine, disk=float(given), origins={**machine.origins, "disk": "given"})
    return machine, source


def _size_table(name: str, records: Records, sizes: Sizes, work: Work, question: Question) -> Table:
    from tierlm.models.outline import Outline

    spec = records.spec
    table = _table(f"{name}, {_format(records)}")
    experts = sizes.experts * sizes.expert
    table.add_row("trunk", f"{format_size(work.trunk_bytes)}, which every token uses")
    used = work.moe_layers * work.experts_per_token
    table.add_row(
        "experts",
        f"{format_size(experts)}: {sizes.experts} of {format_size(sizes.expert)}; a token uses {used} of them, "
        f"{format_size(used * sizes.expert)}",
    )
    if isinstance(records, Outline):
        table.add_row("on disk", f"{format_size(records.file_bytes)} ({records.file_bytes / 1e9:.1f} GB)")
    elif min(work.stored) < 1:
        left = [f"{share:.0%}" for share in work.stored]
        table.add_row("compressed", f"{left[0]} of the experts' bytes are read, and {left[1]} of the trunk's")
    cached, expanded = spec.cache_width, spec.expanded_width
    whole = f"KV cache of {question.context} tokens"
    kv = f"{format_size(sizes.kv)}"
    if expanded != cached:
        kv += f" as latents; {format_size(sizes.kv * expanded / cached)} as keys and values"
    table.add_row(whole, kv)
    return table


def _plan_table(found: Forecast, sizes: Sizes) -> Table:
    table = _table("plan")
    for name, tier in (("vram", found.plan.vram), ("ram", found.plan.ram)):
        if tier is None:
            continue
        held = sum(sizes.trunk[key] for key in tier.trunk)
        used = ", ".join(f"{what} {format_size(size)}" for what, size in tier.parts.items() if size)
        table.add_row(name, used)
        table.add_row("", f"{tier.expert_slots} expert slots; floor {format_size(tier.floor)}")
        rest = len(sizes.trunk) - len(tier.trunk)
        streams = f"; the other {rest} stream through two slots of {format_size(tier.ring)}" if tier.ring else ""
        table.add_row("", f"{len(tier.trunk)} trunks stay, {format_size(held)}{streams}")
    return table


def _speed_table(found: Forecast, work: Work, question: Question, machine: Machine, source: str, routing: str) -> Table:
    table = _table(f"predicted; rates: {source}")
    worst, typical = found.worst, found.typical
    table.add_row(
        "hit rate", f"{typical.hit_rate:.0%} with routing {routing}; {worst.hit_rate:.0%} where it is uniform"
    )
    table.add_row(
        "decode",
        f"[bold]{typical.decode:.2f} tokens/s[/bold] ({worst.decode:.2f} with uniform routing; range {found.low:.2f}-"
        f"{found.high:.2f}), {format_size(typical.step.disk_bytes)} a token from disk; bound by {typical.step.bound}",
    )
    table.add_row(
        "prefill", f"{typical.prefill:.1f} tokens/s for {question.prompt} tokens; bound by {typical.prompt.bound}"
    )
    table.add_row(
        "first token",
        f"{found.first_token:.1f} s after the request; start {found.start:.1f} s and load {found.load:.1f} s before it",
    )
    for what, speed in found.more.items():
        table.add_row(what, f"{speed:.2f} tokens/s ({speed / typical.decode - 1:+.0%})")
    rates = [f"disk {machine.disk / 1e9:.2f} GB/s ({machine.origins['disk']})"]
    if machine.accelerator is not None:
        rates.append(f"card {machine.origins['accelerator']}")
    else:
        rates += [
            f"{kind} {machine.weights[kind] / 1e9:.1f} G weights/s ({machine.origins[kind]})"
            for kind in dict.fromkeys(work.formats)
        ]
    table.add_row("with", ", ".join(rates))
    return table


def _table(title: str) -> Table:
    return Table(show_header=False, title=title, title_justify="left", box=None)


def _as_json(
    name: str,
    records: Records,
    sizes: Sizes,
    work: Work,
    question: Question,
    machine: Machine,
    found: Forecast,
) -> dict[str, Any]:
    from tierlm.models.outline import Outline

    spec = records.spec
    tiers = {"ram": found.plan.ram, "vram": found.plan.vram}
    return {
        "model": name,
        "format": _format(records),
        "bytes": {
            "trunk": work.trunk_bytes,
            "expert": sizes.expert,
            "experts": sizes.experts * sizes.expert,
            "file": records.file_bytes if isinstance(records, Outline) else None,
            "stored": work.stored,
            "kv": sizes.kv,
            "kv_expanded": sizes.kv * spec.expanded_width // spec.cache_width,
        },
        "question": dataclasses.asdict(question),
        "tiers": {
            tier: {
                "floor": part.floor,
                "expert_slots": part.expert_slots,
                "trunks": _names(part.trunk),
                "streamed": _names(key for key in sizes.trunk if key not in part.trunk) if part.ring else [],
                "parts": dict(part.parts),
            }
            for tier, part in tiers.items()
            if part is not None
        },
        "predicted": {
            name: {
                "hit_rate": speed.hit_rate,
                "decode_tokens_per_second": speed.decode,
                "step": dataclasses.asdict(speed.step) | {"bound": speed.step.bound},
                "prefill_tokens_per_second": speed.prefill,
                "prompt": dataclasses.asdict(speed.prompt) | {"bound": speed.prompt.bound},
            }
            for name, speed in (("worst", found.worst), ("typical", found.typical))
        },
        "decode_range": [found.low, found.high],
        "first_token_seconds": found.first_token,
        "load_seconds": found.load,
        "start_seconds": found.start,
        "more": dict(found.more),
        "warnings": list(found.warnings),
        "rates": dataclasses.asdict(machine),
    }


def _names(keys: Iterable[UnitKey]) -> list[str]:
    return [str(key) for key in keys]
