"""``tierlm run``: text from a prompt, or ids from ids."""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from tierlm.cli.generation import ShowStats, System, load, print_stats, sampling, show
from tierlm.cli.options import Json, Loading, Memory, Messages, Model, Sampling, grouped
from tierlm.cli.output import STDOUT, emit
from tierlm.config import Budget, LoadOptions
from tierlm.errors import UsageError
from tierlm.progress import prefill_bar

if TYPE_CHECKING:
    from tierlm.answer import Piece
    from tierlm.llm import LLM


@grouped
def run(
    model: Model,
    *,
    prompt: Annotated[
        str | None, Option("--prompt", "-p", metavar="TEXT", help="The prompt; '-': from standard input.")
    ] = None,
    ids: Annotated[
        str | None, Option(metavar="1,2,3", help="Token ids as the prompt; '-': from stdin. The answer is ids too.")
    ] = None,
    system: System = None,
    raw: Annotated[bool, Option("--raw", help="Continue the text, without the model's chat template.")] = False,
    json: Json = None,
    stats: ShowStats = False,
    budget: Annotated[Budget, Memory()],
    params: Annotated[dict[str, Any], Sampling()],
    options: Annotated[LoadOptions, Loading()],
    quiet: Annotated[bool, Messages()],
) -> None:
    """Answer a prompt, through the model's chat template if it has one. Ctrl-C stops and keeps the text so far."""
    if json not in (None, STDOUT) and (json.is_dir() or not json.parent.is_dir()):
        raise UsageError(f"{json}: cannot be written: expected a file in an existing folder")
    given = _prompt(prompt, ids)
    silent = json == STDOUT
    with load(model, budget, options, quiet or silent) as llm:
        asked = given if raw or ids is not None else _templated(llm, str(given), system)
        if system is not None and asked is given:
            raise UsageError("--system: expected a text prompt for a model with a chat template, and not --raw")
        chosen = sampling(llm, params, quiet or silent)
        with prefill_bar(llm, quiet or silent) as bar:
            pieces = llm.stream(asked, chosen, on_prefill=bar)
            text, new, reason = show(pieces if ids is None else _as_ids(pieces), silent)
        if reason == "interrupted":
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        if stats:
            print_stats(llm.stats())
        if json is not None:
            answer = {"text": text if ids is None else None, "ids": new, "finish_reason": reason}
            emit({"model": model, "prompt": given, **answer, "stats": llm.stats().as_json()}, json)


def _templated(llm: LLM, prompt: str, system: str | None) -> str | list[int]:
    """The prompt as a user's message in the model's chat template; as it is if there is none."""
    if not llm.codec.template:
        return prompt
    instruction = [] if system is None else [{"role": "system", "content": system}]
    return llm.codec.chat([*instruction, {"role": "user", "content": prompt}])


def _prompt(text: str | None, ids: str | None) -> str | list[int]:
    """The prompt, from the one of two options that is given. Raises UsageError."""
    given = [value for value in (text, ids) if value is not None]
    if len(given) != 1:
        raise UsageError("expected one prompt, as --prompt TEXT or as --ids 1,2,3")
    found = sys.stdin.read() if given[0] == "-" else given[0]
    if ids is None:
        return found
    words = re.split(r"[\s,]+", found.strip().rstrip(","))
    if wrong := [word for word in words if not re.fullmatch("[0-9]{1,18}", word)]:
        raise UsageError(f"--ids: expected token ids such as 1,2,3, found {wrong[0]!r}")
    return [int(word) for word in words]


def _as_ids(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same pieces, with ids for text."""
    separator = ""
    for piece in pieces:
        yield dataclasses.replace(piece, text=separator + ",".join(map(str, piece.ids)))
        separator = ","
