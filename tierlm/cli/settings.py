"""Settings that are not on the command line: the config file, and variables of the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tierlm.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "TIERLM"  # TIERLM_RUN_RAM is --ram of `tierlm run`


def config_file() -> Path | None:
    """The config file, which need not exist; None if the user has no home."""
    chosen = os.environ.get("XDG_CONFIG_HOME", "")
    if os.path.isabs(chosen):  # the XDG specification ignores relative paths
        return Path(chosen) / "tierlm" / "config.toml"
    try:
        return Path.home() / ".config" / "tierlm" / "config.toml"
    except RuntimeError:
        return None


def read_config(group: Any) -> dict[str, Any]:
    """The defaults of the commands in ``group``, from the config file: by command, then by parameter.

    The file has a table for each command; its keys are names of options. Raises UsageError.
    """
    file = config_file()
    if file is None or not file.exists():
        return {}
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{file}: expected TOML, found: {error}") from error
    return _defaults(group, tables, str(file))


def variables(group: Any) -> Iterator[tuple[str, bool]]:
    """The variables of the environment that are meant for tierlm, and whether an option takes them."""
    taken = set(_variables(group, PREFIX))
    for name in sorted(os.environ):
        if name.startswith(f"{PREFIX}_"):
            yield name, name in taken


def _defaults(group: Any, tables: dict[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, table in tables.items():
        command = group.commands.get(name)
        if command is None or not isinstance(table, dict):
            known = ", ".join(f"[{command}]" for command in group.commands)
            raise UsageError(f"{where}: expected tables {known}, found {name!r}")
        place = f"{where}: [{name}]"
        if hasattr(command, "commands"):
            found[name] = _defaults(command, table, place)
            continue
        params = {word.lstrip("-"): param for param in command.params for word in param.opts if len(word) > 2}
        for key, value in table.items():
            param = params.get(key.replace("_", "-"))
            if param is None:
                raise UsageError(f"{place}: unknown option {key!r}; `tierlm {name} --help` lists the options")
            several = getattr(param, "multiple", False)
            if isinstance(value, dict) or (isinstance(value, list) and not several):
                raise UsageError(f"{place}: {key}: expected one value, found {value!r}")
            found.setdefault(name, {})[param.name] = [value] if several and not isinstance(value, list) else value
    return found


def _variables(group: Any, prefix: str) -> Iterator[str]:
    for name, command in group.commands.items():
        below = f"{prefix}_{name.upper()}"
        if hasattr(command, "commands"):
            yield from _variables(command, below)
        else:
            yield from (f"{below}_{param.name.upper()}" for param in command.params if param.opts[0].startswith("-"))
