"""``tierlm run`` and ``tierlm chat``: text from a model."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tierlm.config import Budget, SamplingParams
from tierlm.errors import UsageError
from tierlm.files import write_whole

if TYPE_CHECKING:
    from tierlm.llm import LLM
    from tierlm.stats import Stats

Model = Annotated[str, typer.Argument(help="A folder in Hugging Face layout, a hub id, or 'demo'.")]
Ram = Annotated[str, typer.Option(help="Host memory for the whole process, such as 8GiB; auto: most of what is free.")]
Vram = Annotated[str | None, typer.Option(help="Device memory; without an accelerator, host memory that plays one.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="New tokens, at most.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that together have this probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Penalty = Annotated[float, typer.Option(help="Above 1: tokens that stand already become less likely.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")]
Policy = Annotated[
    str,
    typer.Option(
        help="Eviction: default, lru or another of docs/policies.md, a FILE.json of parameters, or module:Class."
    ),
]
Predictor = Annotated[str, typer.Option(help="Prefetch: gate, none, one of docs/traces.md, or module:Class.")]
Reader = Annotated[str, typer.Option(help="auto, direct (O_DIRECT) or mmap.")]
Mirrors = Annotated[
    list[str] | None,
    typer.Option("--mirror", help="A folder with copies of the files on another disk; may be given several times."),
]
Probe = Annotated[bool, typer.Option("--probe", help="Measure the disk again; without it, only at its first use.")]
NoHeat = Annotated[
    bool,
    typer.Option("--no-heat", help="Neither remember which experts are used most, nor load them in the background."),
]
Timeline = Annotated[
    Path | None, typer.Option(help="Write a trace of events to this file, for ui.perfetto.dev or chrome://tracing.")
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Multiply int8 and int4 weights by activations that are not rounded: slower.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, or an accelerator as torch names it.")]
Context = Annotated[int | None, typer.Option(help="Tokens to reserve KV memory for; default: the model's, up to 4096.")]
ShowStats = Annotated[bool, typer.Option("--stats", help="Print what was moved, hit and waited for.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write result and statistics to a file; '-': only that, to stdout.")
]


def run(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt; '-' reads it from standard input.")],
    ram: Ram = "auto",
    vram: Vram = None,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    policy: Policy = "default",
    predictor: Predictor = "gate",
    reader: Reader = "auto",
    mirror: Mirrors = None,
    probe: Probe = False,
    no_heat: NoHeat = False,
    timeline: Timeline = None,
    exact: Exact = False,
    device: Device = "auto",
    context: Context = None,
    stats: ShowStats = False,
    json_file: Json = None,
) -> None:
    """Continue a prompt, printing text as it comes. Ctrl-C ends it with what there is."""
    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()) and json_file != Path("-"):
        raise UsageError(f"{json_file}: cannot be written: a file in an existing folder is needed")
    if prompt == "-":
        prompt = sys.stdin.read()
    params = SamplingParams(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ())
    )
    quiet = json_file == Path("-")
    options = _options(device, policy, predictor, reader, mirror, probe, no_heat, timeline, context, exact)
    with _load(model, ram, vram, quiet, options) as llm:
        text, ids, reason = _show(llm.stream(prompt, params), quiet)
        result = {"model": model, "prompt": prompt, "text": text, "ids": ids, "finish_reason": reason}
        _report(llm.stats(), result, stats, json_file)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="An instruction that stands before the conversation.")] = None,
    ram: Ram = "auto",
    vram: Vram = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    policy: Policy = "default",
    predictor: Predictor = "gate",
    reader: Reader = "auto",
    mirror: Mirrors = None,
    probe: Probe = False,
    no_heat: NoHeat = False,
    timeline: Timeline = None,
    exact: Exact = False,
    device: Device = "auto",
    context: Context = None,
    stats: ShowStats = False,
) -> None:
    """Talk to a model through its own chat template. Ctrl-C ends an answer, Ctrl-D (or an empty line) the talk."""
    params = SamplingParams(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ())
    )
    messages = [{"role": "system", "content": system}] if system else []
    options = _options(device, policy, predictor, reader, mirror, probe, no_heat, timeline, context, exact)
    with _load(model, ram, vram, False, options) as llm:
        while line := _ask():
            messages.append({"role": "user", "content": line})
            text, _, _ = _show(llm.chat(messages, params), quiet=False)
            messages.append({"role": "assistant", "content": text})
        _report(llm.stats(), {}, stats, None)


def _options(
    device: str,
    policy: str,
    predictor: str,
    reader: str,
    mirror: list[str] | None,
    probe: bool,
    no_heat: bool,
    timeline: Path | None,
    context: int | None,
    exact: bool,
) -> dict[str, Any]:
    """The command line's options as those of the API."""
    options: dict[str, Any] = {"device": device, "policy": policy, "predictor": predictor, "reader": reader}
    options |= {"mirrors": tuple(mirror or ()), "probe": "refresh" if probe else "auto"}
    return options | {"heat": not no_heat, "timeline": timeline, "context": context, "exact": exact}


@contextmanager
def _load(model: str, ram: str, vram: str | None, quiet: bool, options: dict[str, Any]) -> Iterator[LLM]:
    """The model, with a progress bar while it loads."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from tierlm.llm import LLM

    console = Console(stderr=True)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("trunk", total=None)
        llm = LLM.load(
            model,
            budget=Budget(ram, vram),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **options,
        )
    try:
        yield llm
    finally:
        llm.close()


def _show(pieces: Any, quiet: bool) -> tuple[str, list[int], str]:
    """Print pieces as they come. Returns text, ids and finish reason; "interrupted" after Ctrl-C."""
    text, ids, reason = "", list[int](), "interrupted"
    try:
        for piece in pieces:
            text += piece.text
            ids += piece.ids
            reason = piece.finish_reason or reason
            if not quiet:
                print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C, while cleaning up, ends it at once
        Console(stderr=True).print("\n[dim]interrupted[/dim]")
    if not quiet:
        print(flush=True)
    return text, ids, reason


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def _report(stats: Stats, result: dict[str, Any], show: bool, json_file: Path | None) -> None:
    if show:
        from tierlm.report import table

        Console(stderr=True).print(table(stats))
    if json_file is None:
        return
    text = json.dumps(result | {"stats": stats.as_json()}, indent=2, default=str)
    if json_file == Path("-"):
        print(text)
        return
    try:
        write_whole(json_file, text + "\n")
    except OSError as error:
        raise UsageError(f"{json_file}: cannot be written: {error.strerror}") from error
