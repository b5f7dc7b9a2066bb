"""Names the weights of other tools, which tierlm does not read. No torch."""

from __future__ import annotations

from pathlib import Path

from tierlm.errors import UnsupportedModelError
from tierlm.files import is_folder

PICKLE = "a pickle, which can run any code when it is loaded; look for the model in safetensors or GGUF"
KINDS = {
    ".onnx": "an ONNX file; look for the model in safetensors or GGUF",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), PICKLE),
}


def refuse_foreign(model: Path) -> None:
    """Raise UnsupportedModelError if ``model`` is such a file, or a folder of such files without safetensors."""
    files = sorted(model.iterdir()) if is_folder(model) else [model]
    if any(file.suffix == ".safetensors" for file in files):
        return
    for file in files:
        if kind := KINDS.get(file.suffix.lower()):
            raise UnsupportedModelError(f"{file}: expected a folder with safetensors or a GGUF file, found {kind}")
