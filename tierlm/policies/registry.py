"""Plug-ins by name: built-in, or any class as ``"module:Class"``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from tierlm.errors import UsageError

T = TypeVar("T")


def lookup(kind: str, name: str, known: Mapping[str, type[T]], base: Any) -> type[T]:
    """The class called ``name``. Raises UsageError for an unknown name, and for a class not derived from ``base``."""
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(f"unknown {kind} {name!r}; known are {', '.join(known)}, or 'module:Class' for your own")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{kind} {name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)) or inspect.isabstract(found):
        raise UsageError(
            f"{kind} {name!r}: expected a complete subclass of {base.__module__}.{base.__name__}, found {found!r}"
        )
    return found
