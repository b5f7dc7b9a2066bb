"""Reads fields of a ``config.json``, with errors that name the file and the field. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tierlm.errors import CheckpointError, UnsupportedModelError
from tierlm.spec import LayerSpec, ModelSpec, Rope, Yarn

MAX_LAYERS = 4096  # about forty times the deepest model: more is a corrupt config


class Config:
    """The fields of the ``config.json`` at ``where``. Methods raise CheckpointError and UnsupportedModelError."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        self.fields, self.where = fields, where
        self.model_type: str = fields["model_type"]
        for name in ("quantization_config", "rope_scaling", "rope_parameters"):
            if not isinstance(self.get(name, {}), Mapping):
                raise CheckpointError(f"{where}: {name}: expected an object, found {fields[name]!r}")

    def get(self, name: str, default: Any = None) -> Any:
        """The field ``name``, unchecked; ``default`` if absent or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def number(self, *names: str, default: int | None = None) -> int:
        """The first field of ``names`` that is present: a non-negative integer."""
        value = next((self.fields[name] for name in names if self.fields.get(name) is not None), default)
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{self.where}: {' or '.join(names)}: expected a whole number, found {value!r}")
        return value

    def layers(self) -> int:
        count = self.number("num_hidden_layers")
        if count > MAX_LAYERS:  # checked before allocating that many
            raise CheckpointError(f"{self.where}: num_hidden_layers: expected at most {MAX_LAYERS}, found {count}")
        return count

    def real(self, name: str, default: float) -> float:
        value = self.fields.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {name}: expected a number, found {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.fields.get(name, default))

    def token_ids(self, name: str) -> tuple[int, ...]:
        """The field ``name``: absent, one id, or a list."""
        value = self.get(name, [])
        return tuple(value) if isinstance(value, list) else (value,)

    def model(self, layers: tuple[LayerSpec, ...], norm_eps: float) -> ModelSpec:
        """The spec of ``layers``, plus the fields common to all families; ``norm_eps`` is a default.
        Also raises ValueError, for impossible sizes."""
        return ModelSpec(
            model_type=self.model_type,
            vocab=self.number("vocab_size"),
            hidden=self.number("hidden_size"),
            layers=layers,
            norm_eps=self.real("rms_norm_eps", norm_eps),
            max_position=self.number("max_position_embeddings"),
            bos=self.get("bos_token_id"),
            eos=self.token_ids("eos_token_id"),
            tied_head=self.flag("tie_word_embeddings", False),
        )

    def allow(self, **allowed: tuple[Any, ...]) -> None:
        """Refuse values that would silently give wrong text: each field must be absent, null, or an allowed value."""
        for name, values in allowed.items():
            if self.get(name, values[0]) not in values:
                wanted = " or ".join(map(repr, values))
                raise UnsupportedModelError(f"{self.where}: {name} {self.fields[name]!r} is not supported; {wanted} is")

    def allow_fp8_blocks(self) -> None:
        """Refuse quantisation other than float8 in 128 x 128 blocks."""
        quantization = self.get("quantization_config", {})
        method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
        if quantization and (method != "fp8" or block != [128, 128]):
            raise UnsupportedModelError(
                f"{self.where}: quantization {method!r} with blocks {block} is not supported; fp8 with [128, 128] is"
            )

    def rope(self, interleaved: bool, theta: float = 10000.0) -> Rope:
        """RoPE from the published ``rope_scaling`` and ``rope_theta``, or transformers 5's ``rope_parameters``."""
        table: dict[str, Any] = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        theta = table.get("rope_theta") or self.get("rope_theta") or theta
        if not isinstance(theta, (int, float)):
            raise CheckpointError(f"{self.where}: rope_theta: expected a number, found {theta!r}")
        kind = table.get("rope_type") or table.get("type") or "default"
        if kind not in ("default", "yarn"):
            raise UnsupportedModelError(f"{self.where}: rope type {kind!r} is not supported; default and yarn are")
        return Rope(float(theta), interleaved, self._yarn(table) if kind == "yarn" else None)

    def _yarn(self, table: Mapping[str, Any]) -> Yarn:
        try:
            original = int(table["original_max_position_embeddings"])
            factor = table.get("factor") or self.fields["max_position_embeddings"] / original
            return Yarn(
                factor=float(factor),
                original_max_position=original,
                beta_fast=float(table.get("beta_fast") or 32),
                beta_slow=float(table.get("beta_slow") or 1),
                mscale=_optional(table, "mscale"),
                mscale_all_dim=_optional(table, "mscale_all_dim"),
                attention_factor=_optional(table, "attention_factor"),
                truncate=bool(table.get("truncate", True)),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self.where}: malformed YaRN parameters: {error!r} in {table}") from error


def _optional(table: Mapping[str, Any], name: str) -> float | None:
    return None if table.get(name) is None else float(table[name])
