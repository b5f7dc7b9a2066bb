"""The language model in a multi-modal checkpoint: its config and the names of its tensors. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

OUTER = ("bos_token_id", "eos_token_id", "quantization_config")  # fields that may be beside text_config
PREFIXES = {  # of the language model's tensors -> without the other models
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
OTHERS = re.compile(
    r"(?:model\.)?(?:vision|visual|audio|embed_vision|embed_audio|multi_modal_projector|mm_projector|patch_merger)"
)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model: of a multi-modal model its ``text_config``, else ``config`` itself."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return config
    found = {name: config[name] for name in ("model_type", *OUTER) if name in config}
    found |= {name: value for name, value in inner.items() if value is not None}
    if "tie_word_embeddings" in config:  # the head is the whole model's
        found["tie_word_embeddings"] = config["tie_word_embeddings"]
    return found


def text_name(name: str) -> str:
    """The name that a tensor of the language model has in a checkpoint of that model alone."""
    for prefix, plain in PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def others(names: Iterable[str]) -> list[str]:
    """The tensors of vision and audio, which are not used."""
    return [name for name in names if OTHERS.match(name)]
