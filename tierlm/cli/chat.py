"""``tierlm chat``: a conversation at the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from tierlm.cli.generation import ShowStats, System, load, note, print_stats, sampling, show
from tierlm.cli.options import Loading, Memory, Messages, Model, Sampling, Stored, grouped
from tierlm.cli.output import writing
from tierlm.cli.reading import Interrupts, history, read_message
from tierlm.config import Budget, LoadOptions
from tierlm.errors import TierlmError, UsageError
from tierlm.files import write_whole
from tierlm.progress import prefill_bar

if TYPE_CHECKING:
    from tierlm.conversation import Conversation

HELP = '''/help           this text
/reset          forget all messages
/system TEXT    another instruction before the conversation; without TEXT, none
/save FILE      write the messages as JSON
/load FILE      go on with the messages of a file
""" or a backslash at the end of a line: several lines; Ctrl-C: stop the answer; Ctrl-D: end'''


@grouped
def chat(
    model: Model,
    *,
    system: System = None,
    stats: ShowStats = False,
    budget: Annotated[Budget, Memory()],
    params: Annotated[dict[str, Any], Sampling(max_new_tokens=512)],
    options: Annotated[LoadOptions, Loading()],
    stored: Annotated[LoadOptions, Stored()],
    quiet: Annotated[bool, Messages()],
) -> None:
    """Chat with a model through its chat template. Ctrl-C ends an answer, Ctrl-D ends the chat, /help says more.

    When the context is short, the oldest turns are left out. The lines you enter are kept in ~/.cache/tierlm.
    """
    with load(model, budget, {**options, **stored}, quiet) as llm:
        from tierlm.conversation import Conversation

        if not llm.codec.template:
            raise UsageError(f"{model}: this model has no chat template; use `tierlm run`")
        talk = Conversation(llm, system=system, params=sampling(llm, params, quiet))
        interrupts = Interrupts()
        with history(), interrupts.handled():
            while (message := read_message(interrupts)) is not None:
                try:
                    if message.startswith("/"):
                        _command(talk, message)
                    else:
                        _answer(talk, message, interrupts, quiet)
                except TierlmError as error:
                    if not sys.stdin.isatty():
                        raise
                    Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        if stats:
            print_stats(llm.stats())


def _answer(talk: Conversation, message: str, interrupts: Interrupts, quiet: bool) -> None:
    before = talk.left_out
    with prefill_bar(talk.llm, quiet) as bar:
        interrupts.during(lambda: show(talk.say(message, on_prefill=bar)))
    if talk.left_out > before:
        note(f"the context is short: the oldest {talk.left_out} messages are left out")


def _command(talk: Conversation, line: str) -> None:
    """Run a line that begins with a slash. Raises UsageError."""
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise UsageError(f"{name}: expected one of {', '.join(COMMANDS)}")
    COMMANDS[name](talk, rest.strip())


def _help(talk: Conversation, rest: str) -> None:
    print(HELP)


def _reset(talk: Conversation, rest: str) -> None:
    talk.messages.clear()


def _system(talk: Conversation, rest: str) -> None:
    talk.system = rest or None


def _save(talk: Conversation, rest: str) -> None:
    file, system = _file(rest), [] if talk.system is None else [{"role": "system", "content": talk.system}]
    with writing(file):
        write_whole(file, json.dumps([*system, *talk.messages], indent=1, ensure_ascii=False) + "\n")
    note(f"{len(talk.messages)} messages in {file}")


def _load(talk: Conversation, rest: str) -> None:
    file = _file(rest)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from error
    if not isinstance(found, list) or not all(isinstance(entry, dict) and "role" in entry for entry in found):
        raise UsageError(f'{file}: expected a list such as [{{"role": "user", "content": "Hello"}}]')
    system = found.pop(0).get("content") if found and found[0]["role"] == "system" else None
    talk.system, talk.messages[:] = system, found
    note(f"{len(found)} messages from {file}")


def _file(rest: str) -> Path:
    if not rest:
        raise UsageError("expected a file name after the command")
    return Path(rest).expanduser()


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/help": _help,
    "/reset": _reset,
    "/system": _system,
    "/save": _save,
    "/load": _load,
}
