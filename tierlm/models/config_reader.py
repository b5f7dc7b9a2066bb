"""Reads fields of a ``config.json``, with errors that name the file and the field. No torch.

Every value is checked here, for its type and against bounds that any real model keeps, before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tierlm.attention_spec import Grouped, Rope, Yarn
from tierlm.errors import CheckpointError, UnsupportedModelError, shown
from tierlm.spec import Dense, LayerSpec, ModelSpec, Moe
from tierlm.tracing.trace import MAX_EXPERTS, MAX_LAYERS

# The largest values, ten or more times those of any published model: what is larger is a corrupt config.
MOST = {
    "num_hidden_layers": MAX_LAYERS,
    "n_routed_experts": MAX_EXPERTS,
    "num_experts": MAX_EXPERTS,
    "num_local_experts": MAX_EXPERTS,
    "num_nextn_predict_layers": 64,
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "max_position_embeddings": 2**31 - 1,
    "original_max_position_embeddings": 2**31 - 1,
}
MOST_OTHER = 2**24
MAX_RECORDS = 2**18  # experts of all layers
MAX_ID = 2**31 - 1  # of a token
LOCAL, GLOBAL = "sliding_attention", "full_attention"  # values of layer_types


class Fields:
    """The fields of a JSON object at ``where``. Null is absent. Methods raise CheckpointError."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        self.fields, self.where = fields, where

    def get(self, name: str, default: Any = None) -> Any:
        """The field ``name``, unchecked."""
        value = self.fields.get(name)
        return default if value is None else value

    def number(self, *names: str, default: int | None = None) -> int:
        """The first field of ``names`` that is present: a whole number from 0 to its bound in MOST."""
        name = next((name for name in names if self.get(name) is not None), names[0])
        value, most = self.get(name, default), MOST.get(name, MOST_OTHER)
        if type(value) is not int:
            raise self.wrong(" or ".join(names), "a whole number", value)
        if not 0 <= value <= most:
            raise self.wrong(name, f"a whole number from 0 to {most}", value)
        return value

    def real(self, name: str, default: float | None = None, *, least: float = 0.0, most: float = 1e6) -> float:
        """The field ``name``: a number from ``least`` to ``most``, so neither NaN nor infinite."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.wrong(name, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def optional(self, name: str) -> float | None:
        """``real``, or None if absent."""
        return None if self.get(name) is None else self.real(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def part(self, name: str) -> Fields:
        """The object ``name``; empty if absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object", value)
        return Fields(value, f"{self.where}: {name}")

    def listed(self, name: str, kind: type, default: Sequence[Any] = ()) -> Sequence[Any]:
        """The field ``name``: a list of ``kind``."""
        values = self.get(name, default)
        if not isinstance(values, (list, tuple)) or not all(type(value) is kind for value in values):
            raise self.wrong(name, f"a list of {kind.__name__}", values)
        return values

    def token_ids(self, name: str) -> tuple[int, ...]:
        """The field ``name``: absent, one id, or a list."""
        value = self.get(name, [])
        values = value if isinstance(value, list) else [value]
        if not all(type(token) is int and 0 <= token <= MAX_ID for token in values):
            raise self.wrong(name, "token ids", value)
        return tuple(values)

    def wrong(self, name: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name}: expected {expected}, found {shown(found)}")


class Config(Fields):
    """The fields of the ``config.json`` at ``where``. Methods also raise UnsupportedModelError."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        super().__init__(fields, where)
        self.model_type: str = fields["model_type"]

    def model(self, layers: tuple[LayerSpec, ...], norm_eps: float, **more: Any) -> ModelSpec:
        """The spec of ``layers``, plus the fields common to all families; ``norm_eps`` is a default. ``more``: other
        fields of ModelSpec. Also raises ValueError, for impossible sizes."""
        spec = ModelSpec(
            model_type=self.model_type,
            vocab=self.number("vocab_size"),
            hidden=self.number("hidden_size"),
            layers=layers,
            norm_eps=self.real("rms_norm_eps", norm_eps, least=1e-30, most=1.0),
            max_position=self.number("max_position_embeddings"),
            bos=next(iter(self.token_ids("bos_token_id")), None),
            eos=self.token_ids("eos_token_id"),
            tied_head=self.flag("tie_word_embeddings", False),
            **more,
        )
        if (records := len(spec.moe_layers) * spec.experts) > MAX_RECORDS:
            raise CheckpointError(f"{self.where}: expected at most {MAX_RECORDS} experts in all, found {records}")
        return spec

    def allow(self, **allowed: tuple[Any, ...]) -> None:
        """Refuse values that would silently give wrong text: each field must be absent, null, or an allowed value."""
        for name, values in allowed.items():
            if (found := self.get(name, values[0])) not in values:
                wanted = " or ".join(map(repr, values))
                raise UnsupportedModelError(f"{self.where}: {name} {shown(found)} is not supported; {wanted} is")

    @property
    def head_dim(self) -> int:
        """The dimensions of a head."""
        return self.number("head_dim", default=self.number("hidden_size") // max(1, self.number("num_attention_heads")))

    def grouped(self, rope: Rope, **more: Any) -> Grouped:
        """Grouped attention of the usual fields. ``more``: other fields of Grouped."""
        heads = self.number("num_attention_heads")
        shared = self.number("num_key_value_heads", default=heads)
        return Grouped(heads=heads, kv_heads=shared, head_dim=self.head_dim, rope=rope, **more)

    def windowed(self, usual: Sequence[str]) -> Sequence[bool]:
        """Whether each layer's attention has a window, by ``layer_types``; ``usual``: its default."""
        layers, kinds = self.number("num_hidden_layers"), self.listed("layer_types", str, usual)
        if len(kinds) != layers or not set(kinds) <= {LOCAL, GLOBAL}:
            raise self.wrong("layer_types", f"{LOCAL} or {GLOBAL} for {layers} layers", kinds)
        return [kind == LOCAL for kind in kinds]

    def sparse(self, attention: Grouped, moe: Moe) -> tuple[LayerSpec, ...]:
        """Layers of which every ``decoder_sparse_step``-th is MoE, except ``mlp_only_layers``."""
        step, dense = self.number("decoder_sparse_step", default=1), set(self.listed("mlp_only_layers", int))
        layers = []
        for layer in range(self.number("num_hidden_layers")):
            sparse = layer not in dense and (layer + 1) % max(1, step) == 0
            layers.append(LayerSpec(attention, moe if sparse else Dense(self.number("intermediate_size"))))
        return tuple(layers)

    def rotated(self, factor: float) -> int:
        """The rotated dimensions of a head; ``factor``: their default share."""
        table = self.part("rope_parameters")
        source = table if table.get("partial_rotary_factor") is not None else self
        return int(self.head_dim * source.real("partial_rotary_factor", factor, most=1.0))

    def rope(self, interleaved: bool, theta: float = 10000.0, dim: int = 0) -> Rope:
        """RoPE from the published ``rope_scaling`` and ``rope_theta``, or transformers 5's ``rope_parameters``.

        ``dim``: rotated dimensions of a head, for families that scale as Llama 3 or Gemma do."""
        table, scaling = self.part("rope_parameters"), self.part("rope_scaling")
        table = table if table.fields else scaling
        named = table if table.get("rope_theta") is not None else self
        theta = named.real("rope_theta", theta, least=2.0, most=1e12)
        kind = table.get("rope_type") or table.get("type") or "default"
        known = ("default", "yarn", "llama3", "linear", "proportional") if dim else ("default", "yarn")
        if kind not in known:
            raise UnsupportedModelError(
                f"{self.where}: rope type {shown(kind)} is not supported; supported are {', '.join(known)}"
            )
        divisors = tuple(self.listed("rope_divisors", float))  # from a GGUF file
        if kind == "llama3":
            divisors = _llama3(table, theta, dim)
        elif kind == "linear":
            divisors = (table.real("factor", least=1.0),) * (dim // 2)
        elif kind == "proportional":
            turning = int(table.real("partial_rotary_factor", 1.0, most=1.0) * dim // 2)
            divisors = (table.real("factor", 1.0, least=1.0),) * turning + (math.inf,) * (dim // 2 - turning)
        if len(divisors) not in (0, dim // 2) or not all(divisor > 0 for divisor in divisors):
            raise self.wrong("rope_divisors", f"{dim // 2} positive numbers", divisors)
        return Rope(theta, interleaved, self._yarn(table) if kind == "yarn" else None, divisors)

    def _yarn(self, table: Fields) -> Yarn:
        original = table.number("original_max_position_embeddings")
        derived = self.number("max_position_embeddings") / max(1, original)
        found = Yarn(
            factor=table.real("factor", derived, least=1.0),
            original_max_position=original,
            beta_fast=table.real("beta_fast", 32.0, least=1e-3),
            beta_slow=table.real("beta_slow", 1.0, least=1e-3),
            mscale=table.optional("mscale"),
            mscale_all_dim=table.optional("mscale_all_dim"),
            attention_factor=table.optional("attention_factor"),
            truncate=table.flag("truncate", True),
        )
        if not original or found.beta_fast < found.beta_slow:
            raise CheckpointError(
                f"{table.where}: YaRN: expected original_max_position_embeddings of at least 1 and beta_fast of at "
                f"least beta_slow, found {original}, {found.beta_fast} and {found.beta_slow}"
            )
        return found


def _llama3(table: Fields, theta: float, dim: int) -> tuple[float, ...]:
    """The divisors of Llama 3.1's RoPE (`_compute_llama3_parameters` in transformers): slow pairs are divided by
    ``factor``, fast ones by 1, with a linear ramp of the frequencies between."""
    original = table.number("original_max_position_embeddings")
    factor = table.real("factor", least=1.0)
    low, high = table.real("low_freq_factor", 1.0, least=1e-3), table.real("high_freq_factor", 4.0, least=1e-3)
    if not low < high:
        raise table.wrong("high_freq_factor", f"more than low_freq_factor, {low}", high)
    found = []
    for pair in range(dim // 2):
        turns = original / (2 * math.pi * theta ** (2 * pair / dim))  # within the original context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / (share + (1 - share) / factor))
    return tuple(found)
