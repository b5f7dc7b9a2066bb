"""``tierlm plan``: the predicted speed of a model within a budget, before it is downloaded. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from tierlm.cli.complete import models_to_plan
from tierlm.cli.options import Json
from tierlm.cli.output import pairs, report
from tierlm.config import format_size, parse_size
from tierlm.errors import UsageError

if TYPE_CHECKING:
    from tierlm.models.outline import Outline, Records
    from tierlm.planning.cost import Machine, Work
    from tierlm.planning.forecast import Forecast, Question
    from tierlm.planning.plan import Sizes
    from tierlm.planning.routing import Routing

Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A folder, a config.json, a GGUF file, a Hub id, 'demo', or a known model such as DeepSeek-V3.",
        autocompletion=models_to_plan,
    ),
]
ASSUMED_ROUTING = "like trained models'"


def plan(
    model: Model,
    ram: Annotated[
        str, Option(metavar="SIZE", help="Memory of the whole process, e.g. 32GiB; auto: most of what is free here.")
    ] = "auto",
    vram: Annotated[str | None, Option(metavar="SIZE", help="Memory of the card that computes.")] = None,
    machine: Annotated[
        Path | None, Option(metavar="FILE", help="Rates of a machine, from `tierlm profile --json`; default: this one.")
    ] = None,
    disk_bandwidth: Annotated[
        str | None, Option(metavar="SIZE", help="Random reads a second, e.g. 3.5GB, instead of the machine's.")
    ] = None,
    format: Annotated[
        str | None,
        Option(metavar="NAME", help="bf16, fp8, int8, int4, mxfp4, int4_g32, nvfp4 or q4_k_m; default: as published."),
    ] = None,
    context: Annotated[
        int | None,
        Option(
            "--context", "--ctx-size", "-c", metavar="N", help="Tokens to reserve KV memory for; default: up to 4096."
        ),
    ] = None,
    prompt: Annotated[int, Option(metavar="N", help="Tokens of the prompt, for the time to the first token.")] = 512,
    batch: Annotated[int, Option(min=1, metavar="N", help="Sequences that decode together.")] = 1,
    logits_tokens: Annotated[
        int | None, Option(metavar="N", help="Tokens whose logits one call of LLM.logits returns.")
    ] = None,
    trace: Annotated[
        Path | None,
        Option(metavar="FILE", exists=True, dir_okay=False, help="A trace of routing, instead of assumed hit rates."),
    ] = None,
    json: Json = None,
) -> None:
    """Predict bytes, slots and tokens a second of a model on a machine within a budget. Needs no weights."""
    from tierlm.config import DEFAULT_CONTEXT, RuntimeOptions
    from tierlm.host import available_ram
    from tierlm.models.outline import KV_BYTES, kv_dtype_of, sizes_of, work_of
    from tierlm.planning.forecast import Question, forecast
    from tierlm.planning.plan import AUTO_RAM

    name, records = _records(model, format)
    tokens = context or min(records.spec.max_position, DEFAULT_CONTEXT)
    if not 1 <= tokens <= records.spec.max_position:
        raise UsageError(f"context: expected 1 to the model's own {records.spec.max_position}, found {context}")
    if not 1 <= prompt <= tokens:
        raise UsageError(f"prompt: expected 1 to the context of {tokens} tokens, found {prompt}")
    if batch * prompt > tokens:
        raise UsageError(
            f"batch: {batch} sequences of {prompt} tokens need a context of {batch * prompt}, found {tokens}: give "
            "--context, or a shorter --prompt"
        )
    options = RuntimeOptions(context=tokens, logits_tokens=logits_tokens)
    free = available_ram()
    question = Question(
        ram=int(free * AUTO_RAM) if ram == "auto" else parse_size(ram, "ram"),
        vram=None if vram is None else parse_size(vram, "vram"),
        context=tokens,
        prompt=prompt,
        chunk=options.prefill_chunk,
        batch=batch,
    )
    rates, source = _machine(machine, disk_bandwidth, question.vram is not None)
    kv_item = KV_BYTES[kv_dtype_of(records, options)]
    sizes, work = sizes_of(records, tokens, options.prefill_chunk, kv_item, logits_tokens), work_of(records)
    recorded, routing = _recorded(trace, work)
    found = forecast(sizes, work, rates, question, free if machine is None else None, recorded)
    answer = _Answer(name, records, sizes, work, question, rates, found)
    report(
        answer.as_json() | {"routing": routing},
        json,
        pairs(answer.bytes(), f"{name}, {answer.format}"),
        pairs(found.plan.rows(), "plan"),
        pairs(answer.speed(routing), f"predicted; rates: {source}"),
        *(f"[yellow]note[/yellow] {warning}" for warning in found.warnings),
    )


@dataclasses.dataclass(frozen=True)
class _Answer:
    """A forecast and its inputs, as rows of tables and as JSON."""

    name: str
    records: Records
    sizes: Sizes
    work: Work
    question: Question
    machine: Machine
    found: Forecast

    @property
    def outline(self) -> Outline | None:
        """The records, if computed from a config."""
        from tierlm.models.outline import Outline

        return self.records if isinstance(self.records, Outline) else None

    @property
    def format(self) -> str:
        """One name, or the experts' and the trunk's."""
        experts, trunk, _ = self.records.formats
        if self.outline is not None:
            return self.outline.format
        return experts if experts == trunk else f"{experts}/{trunk}"

    @property
    def expanded_kv(self) -> int:
        """Bytes of the KV cache with expanded keys and values."""
        spec = self.records.spec
        return self.sizes.kv * spec.expanded_width // max(1, spec.cache_width)

    def bytes(self) -> Iterator[tuple[str, str]]:
        """Sizes of the model."""
        sizes, work = self.sizes, self.work
        yield "trunk", f"{format_size(work.trunk_bytes)}, used by every token"
        used = work.moe_layers * work.experts_per_token
        what = f"{format_size(sizes.experts * sizes.expert)}: {sizes.experts} of {format_size(sizes.expert)}"
        yield "experts", f"{what}; a token uses {used} of them, {format_size(used * sizes.expert)}"
        if self.outline is not None:
            nbytes = self.outline.file_bytes
            yield "on disk", f"{format_size(nbytes)} ({nbytes / 1e9:.1f} GB)"
        elif min(work.stored) < 1:
            experts, trunk = work.stored
            yield "compressed", f"{experts:.0%} of the experts' bytes are read, and {trunk:.0%} of the trunk's"
        kv = format_size(sizes.kv)
        if self.expanded_kv != sizes.kv:
            kv += f" as latents; {format_size(self.expanded_kv)} as keys and values"
        yield f"KV cache of {self.question.context} tokens", kv

    def speed(self, routing: str) -> Iterator[tuple[str, str]]:
        """Expected speed, and the rates behind it."""
        found, machine = self.found, self.machine
        worst, typical = found.worst, found.typical
        batch = self.question.batch
        if batch > 1:
            used = f"{typical.used:.0f} of {self.work.experts} experts of a layer in a step"
            yield f"{batch} sequences", f"{used}; {typical.decode / batch:.2f} tokens/s each"
        yield "hit rate", f"{typical.hit_rate:.0%} with routing {routing}; {worst.hit_rate:.0%} with uniform routing"
        yield (
            "decode",
            f"[bold]{typical.decode:.2f} tokens/s[/bold] ({worst.decode:.2f} with uniform routing; range "
            f"{found.low:.2f}-{found.high:.2f}), {format_size(typical.step.disk_bytes / batch)} a token from disk; "
            f"bound by {typical.step.bound}",
        )
        prefill = f"{typical.prefill:.1f} tokens/s for {self.question.prompt} tokens"
        yield "prefill", f"{prefill}; bound by {typical.prompt.bound}"
        before = f"start {found.start:.1f} s and load {found.load:.1f} s before it"
        yield "first token", f"{found.first_token:.1f} s after the request; {before}"
        for what, speed in found.more.items():
            yield what, f"{speed:.2f} tokens/s ({speed / typical.decode - 1:+.0%})"
        rates = [f"disk {machine.disk / 1e9:.2f} GB/s ({machine.origins['disk']})"]
        if machine.accelerator is not None:
            rates.append(f"card {machine.origins['accelerator']}")
        else:
            rates += [
                f"{kind} {machine.weights[kind] / 1e9:.1f} G weights/s ({machine.origins[kind]})"
                for kind in dict.fromkeys(self.work.formats)
            ]
        yield "with", ", ".join(rates)

    def as_json(self) -> dict[str, Any]:
        found, sizes = self.found, self.sizes
        return {
            "model": self.name,
            "format": self.format,
            "bytes": {
                "trunk": self.work.trunk_bytes,
                "expert": sizes.expert,
                "experts": sizes.experts * sizes.expert,
                "file": self.outline and self.outline.file_bytes,
                "stored": self.work.stored,
                "kv": sizes.kv,
                "kv_expanded": self.expanded_kv,
            },
            "question": dataclasses.asdict(self.question),
            "tiers": {
                name: {
                    "floor": tier.floor,
                    "expert_slots": tier.expert_slots,
                    "trunks": [str(key) for key in tier.trunk],
                    "streamed": [str(key) for key in sizes.trunk if key not in tier.trunk] if tier.ring else [],
                    "parts": dict(tier.parts),
                }
                for name, tier in found.plan.tiers.items()
            },
            "predicted": {
                name: {
                    "hit_rate": speed.hit_rate,
                    "used_experts": speed.used,
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
            "rates": dataclasses.asdict(self.machine),
        }


def _records(model: str, format: str | None) -> tuple[str, Records]:
    """The records of a model: from its files, if they exist and ``format`` is None, else from its config."""
    from tierlm.models.catalog import Catalog
    from tierlm.models.outline import Outline
    from tierlm.planning.known import find_config

    named = find_config(model)
    if named.path is not None and format is None:
        return named.name, Catalog(named.path)
    return named.name, Outline(named.config, named.where, format)


def _recorded(file: Path | None, work: Work) -> tuple[Routing | None, str]:
    """The routing of a trace, if given, and the expected routing in words."""
    if file is None:
        return None, ASSUMED_ROUTING
    from tierlm.planning.recorded import RecordedHits
    from tierlm.tracing.traceforms import read_trace

    hits = RecordedHits(read_trace(file))
    return hits, f"as recorded: {hits.describe(work)}"


def _machine(file: Path | None, bandwidth: str | None, card: bool) -> tuple[Machine, str]:
    """The rates of the machine, and their source in words."""
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
            raise UsageError("disk bandwidth: expected more than 0")
        machine = dataclasses.replace(machine, disk=float(given), origins={**machine.origins, "disk": "given"})
    return machine, source
