"""The examples in the documents: Python runs with the demo model, commands parse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from examples import commands, python_blocks

from tierlm.cli import app

BLOCKS = python_blocks()


@pytest.mark.parametrize("name", BLOCKS)
def test_python_runs(name: str) -> None:
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": name})


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command, option and kind of value exists. Nothing runs. The files that are named exist."""
    monkeypatch.chdir(tmp_path)
    for file in (Path(word) for word in words if re.fullmatch(r"[\w/-]+\.\w+", word)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    command, rest = typer.main.get_command(app), words
    while hasattr(command, "commands"):
        context = command.make_context(None, [rest[0]])
        _, command, _ = command.resolve_command(context, rest)
        rest = rest[1:]
    command.make_context(None, list(rest))


def test_there_are_examples() -> None:
    assert any("SamplingParams" in source for source in BLOCKS.values())
    assert {"run", "chat", "pack", "verify", "trace", "simulate"} <= {words[0] for words in commands()}
