"""From a model's name to its config, without its weights. Published models are known by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierlm.checkpoints.container import describe, read_config
from tierlm.checkpoints.foreign import refuse_foreign
from tierlm.checkpoints.gguf_header import gguf_in
from tierlm.checkpoints.hub import DEMO, HubId, find_hub_config
from tierlm.errors import ModelNotFoundError
from tierlm.files import is_file, is_folder

# name -> Hub ids, source of the dimensions, second source that they were checked against, config
DATA = Path(__file__).with_name("known.json")


@dataclass(frozen=True)
class Named:
    """A model's config and where it was found. ``path``: its folder or GGUF file, if the weights are there too."""

    name: str
    config: Mapping[str, Any]
    where: str
    path: Path | None = None


def known_models() -> dict[str, Any]:
    """The published models whose configs ship with the package, by name."""
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


def find_config(model: str) -> Named:
    """The config of ``model``: "demo", a folder, a ``config.json``, a known name or Hub id, or another Hub id, of which
    only the config (of a GGUF file: its header) is downloaded. Raises CheckpointError."""
    path = DEMO if model == "demo" else Path(model)
    if (file := gguf_in(path)) is not None:
        described = describe(file)
        return Named(file.stem, described.config, described.where, file)
    if not is_file(path / "config.json"):
        refuse_foreign(path)
    if is_folder(path):
        config = read_config(path / "config.json")
        whole = any(path.glob("*.safetensors"))
        return Named(path.resolve().name, config, str(path / "config.json"), path if whole else None)
    if is_file(path):
        return Named(path.stem, read_config(path), str(path))
    known = known_models()
    for name, entry in known.items():
        if model.lower() in (name.lower(), *(hub.lower() for hub in entry["hub"])):
            return Named(name, entry["config"], f"known as {name}")
    if (found := HubId.parse(model)) is None:
        raise ModelNotFoundError(
            f"{model}: no such folder or file, and no known model; give a model folder, a config.json, a hub id, or "
            f"one of {', '.join(known)}"
        )
    file = find_hub_config(found)
    if file.suffix == ".gguf":
        described = describe(file)
        return Named(model, described.config, described.where, file)
    return Named(model, read_config(file if file.is_file() else file / "config.json"), str(file))
