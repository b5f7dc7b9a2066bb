"""From a model's name to its folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tierlm.checkpoints.foreign import refuse_foreign
from tierlm.checkpoints.gguf_header import gguf_in
from tierlm.errors import CheckpointError, ModelNotFoundError

DEMO = Path(__file__).parent.parent / "demo"


def find_model(model: str | Path) -> Path:
    """The path of ``model``: a folder, a GGUF file, "demo" (embedded) or a Hub id (downloaded).

    Raises CheckpointError.
    """
    if model == "demo":
        return DEMO
    folder = Path(model)
    if (file := gguf_in(folder)) is not None:
        return file
    refuse_foreign(folder)
    if os.path.isdir(folder):  # unlike Path.is_dir, false for a name that is too long
        return folder
    if os.path.isfile(folder):
        raise CheckpointError(f"{folder}: expected a folder in Hugging Face layout or a GGUF file, found another file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) is None or str(model).startswith("."):
        raise ModelNotFoundError(f"{folder}: no such folder; give a folder in Hugging Face layout, a hub id, or 'demo'")
    from huggingface_hub import snapshot_download  # slow to import, rarely needed
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"{model}: no such folder, and not available on the Hub: {error}") from error
    return Path(found)
