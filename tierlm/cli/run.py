"""``tierlm run``: text from a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from tierlm.cli.generation import ShowStats, load, print_stats, show
from tierlm.cli.options import Loading, Memory, Model, Sampling, grouped
from tierlm.cli.output import STDOUT, emit
from tierlm.config import Budget, LoadOptions, SamplingParams
from tierlm.errors import UsageError

Json = Annotated[
    Path | None, Option("--json", help="Write result and statistics to a file; '-': to stdout, without other output.")
]


@grouped
def run(
    model: Model,
    *,
    prompt: Annotated[str, Option("--prompt", "-p", help="The prompt; '-' reads it from standard input.")],
    budget: Annotated[Budget, Memory()],
    params: Annotated[SamplingParams, Sampling()],
    options: Annotated[LoadOptions, Loading()],
    stats: ShowStats = False,
    json_file: Json = None,
) -> None:
    """Continue a prompt and print the text as it is generated. Ctrl-C stops and keeps the text so far."""
    if json_file not in (None, STDOUT) and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise UsageError(f"{json_file}: cannot be written: expected a file in an existing folder")
    if prompt == "-":
        prompt = sys.stdin.read()
    quiet = json_file == STDOUT
    with load(model, budget, options, quiet) as llm:
        text, ids, reason = show(llm.stream(prompt, params), quiet)
        if stats:
            print_stats(llm.stats())
        if json_file is not None:
            result = {"model": model, "prompt": prompt, "text": text, "ids": ids, "finish_reason": reason}
            emit(result | {"stats": llm.stats().as_json()}, json_file)
