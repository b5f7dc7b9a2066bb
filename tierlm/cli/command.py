"""How every command parses its line and shows its help."""

from __future__ import annotations

from typing import Any

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup

from tierlm.cli.settings import config_file
from tierlm.errors import UsageError

Misuse: Any = BadParameter.__base__  # the base of all errors of parsing, which typer does not export


class Command(TyperCommand):
    """A command with plain help: no types for flags, no variable beside each option."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))


class CommandGroup(TyperGroup):
    """A command that has commands. Alone, it prints its help."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])


def explain(misuse: Any) -> UsageError:
    """The error for a command line that cannot be parsed: one line, with the source of a value not given on it."""
    message = " ".join(misuse.format_message().split()).rstrip(".")
    context: Any = misuse.ctx
    parameter: Any = getattr(misuse, "param", None)
    if context is None:
        return UsageError(message)
    source = parameter and context.get_parameter_source(parameter.name)
    if source and source.name == "ENVIRONMENT":
        message += f", in {context.auto_envvar_prefix}_{parameter.name.upper()}"
    elif source and source.name == "DEFAULT_MAP":
        message += f", in {config_file()}"
    return UsageError(f"{message}; see `{context.command_path} --help`")


def _plain(params: list[Any]) -> list[Any]:
    for param in params:
        param.show_envvar = False
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params
