"""``tierlm trace`` and ``tierlm simulate``: record the experts a run demands, and replay them with another policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from tierlm.cli.command import Command, CommandGroup
from tierlm.cli.complete import policies, predictors
from tierlm.cli.generation import load
from tierlm.cli.options import Json, Loading, Memory, Messages, Model, Sampling, grouped
from tierlm.cli.output import pairs, report, writing
from tierlm.config import Budget, LoadOptions, SamplingParams, format_size, parse_size
from tierlm.errors import UsageError

if TYPE_CHECKING:
    from tierlm.tracing.timing import Rates
    from tierlm.tracing.trace import Trace

RECORD_BYTES = 8 * 2**20  # default for traces without it: an expert of DeepSeek-V2-Lite in fp8
FRACTION = 0.25  # default share of experts with slots
RATES = "Machine"

File = Annotated[
    Path, Argument(metavar="TRACE", exists=True, dir_okay=False, help="A trace: tierlm's own, jsonl or npz.")
]

trace = typer.Typer(cls=CommandGroup, help="Record the choices of a model's routers; describe and convert traces.")


@trace.command(cls=Command)
@grouped
def record(
    model: Model,
    *,
    prompts: Annotated[Path, Option(metavar="FILE", help="A text file, one prompt a line.")],
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="The trace to write.")],
    scores: Annotated[bool, Option("--scores", help="Also record all experts' scores and gate predictions.")] = False,
    json: Json = None,
    budget: Annotated[Budget, Memory()],
    params: Annotated[dict[str, Any], Sampling()],
    options: Annotated[LoadOptions, Loading()],
    quiet: Annotated[bool, Messages()],
) -> None:
    """Continue prompts one by one, and record the experts of every token."""
    try:
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{prompts}: expected a text file with a prompt a line: {error}") from error
    if not lines:
        raise UsageError(f"{prompts}: expected a prompt a line, found none")
    options["trace"], options["trace_scores"] = output, scores
    with load(model, budget, options, quiet) as llm:
        for line in lines:
            llm.generate(line, SamplingParams(**params))
    info(output, json)


@trace.command(cls=Command)
def info(file: File, json: Json = None) -> None:
    """Describe a trace. An invalid file is refused with the line or offset of the error."""
    from tierlm.tracing.traceforms import read_trace

    found = read_trace(file, scores=True)
    rows = {
        "model": found.info.model,
        "tokens": len(found),
        "prefill_tokens": int(found.prefill.sum()),
        "sequences": int(found.sequences.max()) + 1,
        "steps": sum(1 for _ in found.bounds()),
        "layers": found.info.layers,
        "moe_layers": found.moe_layers,
        "experts": found.info.experts,
        "experts_per_token": found.experts.shape[2],
        "record_bytes": found.info.record_bytes,
        "scores": found.scores is not None,
    }
    report(rows, json, pairs((name.replace("_", " "), value) for name, value in rows.items()))


@trace.command(cls=Command)
def convert(
    file: File,
    output: Annotated[Path, Argument(metavar="OUTPUT", help="The file to write.")],
    to: Annotated[
        str, Option("--to", metavar="FORM", help="tierlm, jsonl, npz, or oracle (libCacheSim's).")
    ] = "tierlm",
) -> None:
    """Convert a trace to another file format."""
    from tierlm.tracing.traceforms import convert as write
    from tierlm.tracing.traceforms import read_trace

    found = read_trace(file, scores=to == "tierlm")
    with writing(output):
        write(found, output, to)


def simulate(
    file: File,
    policy: Annotated[
        str,
        Option(
            metavar="NAME",
            help="Eviction: default, another of docs/policies.md, belady, FILE.json, or module:Class.",
            autocompletion=policies,
        ),
    ] = "default",
    predictor: Annotated[
        str,
        Option(
            metavar="NAME", help="Prefetch: none, one of docs/traces.md, or module:Class.", autocompletion=predictors
        ),
    ] = "none",
    cache_fraction: Annotated[float | None, Option(metavar="X", help="Slots, as a share of all experts.")] = None,
    ram: Annotated[str | None, Option(metavar="SIZE", help="Slots, as memory for experts only, e.g. 4GiB.")] = None,
    batch: Annotated[
        int | None, Option(min=1, metavar="N", help="Run the trace's sequences N at a time; default: as recorded.")
    ] = None,
    tune: Annotated[
        int | None, Option(metavar="TRIALS", help="Tune the policy's parameters on the first part of the trace.")
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FILE", help="Write the tuned policy, for --policy.")
    ] = None,
    record_bytes: Annotated[
        str | None,
        Option(metavar="SIZE", help="Bytes of an expert; default: the trace's, or 8MiB.", rich_help_panel=RATES),
    ] = None,
    disk_bandwidth: Annotated[
        str, Option(metavar="SIZE", help="Bytes a second of the disk.", rich_help_panel=RATES)
    ] = "1.4GB",
    disk_latency: Annotated[
        float, Option(metavar="MS", help="Latency of a read in milliseconds.", rich_help_panel=RATES)
    ] = 0.1,
    disk_depth: Annotated[int, Option(metavar="N", help="Concurrent reads.", rich_help_panel=RATES)] = 8,
    layer_ms: Annotated[
        float, Option(metavar="MS", help="Compute of a layer without experts, a token.", rich_help_panel=RATES)
    ] = 0.5,
    expert_ms: Annotated[
        float | None,
        Option(metavar="MS", help="Compute of an expert; default: bytes at 10 GB/s.", rich_help_panel=RATES),
    ] = None,
    json: Json = None,
) -> None:
    """Replay a trace with a policy and a predictor on a machine.

    The cache starts empty, and its first misses count. Without --cache-fraction and --ram, a quarter of the experts
    have slots.
    """
    from tierlm.policies.predictors import PREDICTORS, make_predictor
    from tierlm.tracing.batches import batched
    from tierlm.tracing.replay import open_policy
    from tierlm.tracing.simulate import simulate as run
    from tierlm.tracing.traceforms import read_trace

    gates = make_predictor(predictor, 1).gates if predictor in PREDICTORS else True
    found = read_trace(file, scores=gates)
    if batch is not None:
        found = batched(found, batch)
    nbytes = parse_size(record_bytes or found.info.record_bytes or RECORD_BYTES, "record-bytes")
    machine = _machine(nbytes, disk_bandwidth, disk_latency, disk_depth, layer_ms, expert_ms)
    slots = _slots(found, cache_fraction, ram, nbytes)
    if (tune is None) is not (output is None):
        raise UsageError("--tune TRIALS and --output FILE go together")
    if tune is not None and output is not None:
        _tune(found, policy, slots, tune, output, json)
        return
    chosen = make_predictor(predictor, found.experts.shape[2])
    result = run(found, open_policy(policy, found, slots), chosen, slots, machine)
    numbers = {"policy": policy, "predictor": predictor, "cache_fraction": slots / found.records, **result.as_json()}
    share = f"{slots} of {found.records} experts, {slots / found.records:.1%}"
    share += " (default: a quarter)" if cache_fraction is None and ram is None else ""
    demands = f"of {result.demanded} demands; {result.missed} misses, {result.late_hits} late hits"
    per_token = format_size(result.bytes_read / result.tokens)
    rows = {
        "policy, predictor": f"{policy}, {predictor}",
        "slots": share,
        "hit rate": f"{result.hit_rate:.1%} {demands}",
        "prefetched": f"{result.prefetched}: {result.useful} useful, {result.wasted} wasted, "
        f"{result.cancelled} cancelled",
        "read": f"{format_size(result.bytes_read)}, {per_token} a token",
        "waited": f"{result.stall_seconds / result.seconds:.0%} of {result.seconds:.2f} s",
        "tokens/s": f"{result.tokens_per_second:.2f}",
        "machine": f"{format_size(nbytes)} and {machine.expert_seconds * 1e3:.3g} ms an expert, {layer_ms:g} ms a "
        f"layer without experts; disk {disk_bandwidth}/s",
    }
    report(numbers, json, pairs(rows.items(), f"{file.name}: {len(found)} tokens, cold start included"))


def _machine(
    nbytes: int, bandwidth: str, latency: float, depth: int, layer_ms: float, expert_ms: float | None
) -> Rates:
    from tierlm.tracing.link import Speed
    from tierlm.tracing.timing import Rates

    speed = parse_size(bandwidth, "disk-bandwidth")
    expert = nbytes / 10e9 if expert_ms is None else expert_ms / 1e3
    given = {"record-bytes": nbytes, "disk-bandwidth": speed, "disk-depth": depth}
    for name, value in given.items():
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, found {value}")
    for name, seconds in {"disk-latency": latency, "layer-ms": layer_ms, "expert-ms": expert}.items():
        if not 0 <= seconds < float("inf"):
            raise UsageError(f"{name}: expected milliseconds of at least 0, found {seconds}")
    return Rates(nbytes, Speed(speed, latency / 1e3, depth), layer_ms / 1e3, expert)


def _slots(found: Trace, fraction: float | None, ram: str | None, nbytes: int) -> int:
    """The number of slots: at least one token's experts of one layer. Raises UsageError."""
    if fraction is not None and ram is not None:
        raise UsageError("--cache-fraction and --ram both set the slots: give one of them")
    if fraction is not None and not 0 < fraction <= 1:
        raise UsageError(f"cache-fraction: expected a share above 0 and up to 1, found {fraction}")
    if ram is not None:
        slots = parse_size(ram, "ram") // nbytes
    else:
        slots = round(found.records * (FRACTION if fraction is None else fraction))
    least = found.experts.shape[2]
    if slots < least:
        raise UsageError(f"{slots} slots are fewer than the {least} experts that a token needs of one layer")
    return min(slots, found.records)


def _tune(found: Trace, policy: str, slots: int, trials: int, output: Path, json: Path | None) -> None:
    from tierlm.policies import write_policy
    from tierlm.tracing.tune import tune

    tuned = tune(found, policy, slots, trials)
    with writing(output):
        write_policy(output, tuned.policy, tuned.parameters)
    numbers = {"policy": tuned.policy, "parameters": tuned.parameters, "slots": slots, "trials": trials}
    numbers |= {"train": tuned.train, "test": tuned.test, "test_untuned": tuned.untuned, "file": str(output)}
    rows = {
        "hit rate on the first part": f"{tuned.train:.2%}",
        "on the rest, tuned": f"{tuned.test:.2%}",
        "on the rest, untuned": f"{tuned.untuned:.2%}",
        "parameters": ", ".join(f"{name} {value:.4g}" for name, value in tuned.parameters.items()) or "the defaults",
        "written to": output,
    }
    report(numbers, json, pairs(rows.items(), f"{policy}: {trials} trials on the first {tuned.split} tokens"))
