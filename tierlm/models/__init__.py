"""The mathematics of the architectures, and which there are. No torch in this file."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tierlm.errors import UnsupportedModelError
from tierlm.models import deepseek

FAMILIES: dict[str, ModuleType] = dict.fromkeys(deepseek.MODEL_TYPES, deepseek)


def family_of(config: Mapping[str, Any], where: str) -> ModuleType:
    """The family module for a ``config.json``. Raises UnsupportedModelError, listing what is supported."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return family
