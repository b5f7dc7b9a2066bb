"""Words that the shell completes a value with. typer keeps those that begin like the incomplete one."""

from __future__ import annotations

import os


def models(incomplete: str) -> list[str]:
    """Folders, and the embedded model."""
    parent = os.path.dirname(incomplete)
    try:
        names = sorted(entry.name for entry in os.scandir(parent or ".") if entry.is_dir())
    except OSError:
        names = []
    return [*(f"{os.path.join(parent, name)}/" for name in names), "demo"]


def models_to_plan(incomplete: str) -> list[str]:
    """The same, and the models known by name."""
    from tierlm.planning.known import known_models

    return [*models(incomplete), *known_models()]


def policies() -> list[str]:
    from tierlm.policies import POLICIES

    return ["default", *POLICIES]


def predictors() -> list[str]:
    from tierlm.policies.predictors import PREDICTORS

    return list(PREDICTORS)


def readers() -> list[str]:
    return ["auto", "direct", "mmap"]
