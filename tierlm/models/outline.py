"""A model's records derived from its config alone, before its files are downloaded. No torch.

``Catalog`` does the same from files. Both get their tensors from the family, and pass sizes to the plan by
``sizes_of``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tierlm.checkpoints.record import ALIGNMENT
from tierlm.config import RuntimeOptions
from tierlm.errors import UsageError
from tierlm.formats import FORMATS
from tierlm.models import family_of, read_spec
from tierlm.models.catalog import HEAD_BLOCK_BYTES
from tierlm.models.config_reader import Fields
from tierlm.models.family import Family, Shapes
from tierlm.models.quantization import published
from tierlm.planning.cost import Formats, Work
from tierlm.planning.mixtures import MIXTURES, bits_of
from tierlm.planning.plan import MAX_LOGITS, Sizes, workspace_bytes
from tierlm.spec import STATES, ExpertKey, HeadKey, Key, ModelSpec, ResidentKey, TrunkKey, UnitKey

KV_BYTES = {"float32": 4, "bfloat16": 2}  # of a cached value


class Records(Protocol):
    """The common interface of ``Catalog`` and ``Outline``."""

    spec: ModelSpec
    family: Family
    trunks: list[UnitKey]

    @property
    def formats(self) -> Formats: ...

    def experts(self) -> list[ExpertKey]: ...

    def size(self, key: Key) -> int: ...

    def stored_share(self, keys: Sequence[Key]) -> float: ...


class Outline:
    """The records of a ``config.json``. ``format``: one of MIXTURES; None: the format stated by the config.

    Raises UnsupportedModelError, CheckpointError, UsageError.
    """

    def __init__(self, config: Mapping[str, Any], where: str, format: str | None = None):
        self.family = family_of(config.get("model_type"), where)
        self.spec = read_spec(config, where)
        if format is not None and format not in MIXTURES:
            raise UsageError(f"format: expected one of {', '.join(MIXTURES)}, found {format!r}")
        self._mixture = published(Fields(config, where)) if format is None else MIXTURES[format]
        self.format = format or self._mixture.experts
        spec = self.spec
        row = math.ceil(spec.hidden * bits_of(self._mixture.head, spec.hidden) / 8)
        rows = max(1, HEAD_BLOCK_BYTES // row)
        self._blocks: list[int] = [min(rows, spec.vocab - at) * row for at in range(0, spec.vocab, rows)]
        layers, blocks = range(len(spec.layers)), range(len(self._blocks))
        self.trunks: list[UnitKey] = [*map(TrunkKey, layers), *map(HeadKey, blocks)]
        self._prediction_layers = Fields(config, where).number("num_nextn_predict_layers", default=0)
        self._sizes: dict[Key, int] = {}

    def experts(self) -> list[ExpertKey]:
        return [ExpertKey(layer, e) for layer in self.spec.moe_layers for e in range(self.spec.experts)]

    def size(self, key: Key) -> int:
        """Bytes of a slot for ``key``, in a file that is not aligned to pages: half a page lost at either end."""
        like = ExpertKey(key.layer, 0) if isinstance(key, ExpertKey) else key
        if like not in self._sizes:
            self._sizes[like] = (self._bytes(like) // ALIGNMENT + 2) * ALIGNMENT
        return self._sizes[like]

    def stored_share(self, keys: Sequence[Key]) -> float:
        """Nothing is compressed."""
        return 1.0

    @property
    def formats(self) -> Formats:
        return Formats(self._mixture.experts, self._mixture.trunk, self._mixture.head)

    @property
    def used_bytes(self) -> int:
        """Bytes of the tensors used by a run."""
        spec = self.spec
        layers = sum(self._bytes(TrunkKey(layer)) for layer in range(len(spec.layers)))
        experts = sum(spec.experts * self._bytes(ExpertKey(layer, 0)) for layer in spec.moe_layers)
        wide = self._wide_bytes(self._mixture.head) if spec.tied_head else self._embedding_and_head
        return layers + experts + wide + self._bytes(ResidentKey())

    @property
    def file_bytes(self) -> int:
        """Bytes of all published tensors. A multi-token prediction layer has its own embedding, head and projection
        (DeepSeek-V3 technical report, arXiv 2412.19437, 2.2)."""
        spec = self.spec
        layer = self._bytes(TrunkKey(len(spec.layers) - 1))
        layer += sum(spec.experts * self._bytes(ExpertKey(last, 0)) for last in spec.moe_layers[-1:])
        extra = layer + self._embedding_and_head + 4 * spec.hidden**2
        return self.used_bytes + self._prediction_layers * extra

    @property
    def _embedding_and_head(self) -> int:
        return self._wide_bytes(self._mixture.embedding) + self._wide_bytes(self._mixture.head)

    def _wide_bytes(self, format: str) -> int:
        return math.ceil(self.spec.vocab * self.spec.hidden * bits_of(format, self.spec.hidden) / 8)

    def _bytes(self, key: Key) -> int:
        if isinstance(key, ExpertKey):
            return _bytes(self.family.expert_tensors(self.spec, key), self._mixture.experts)
        if isinstance(key, TrunkKey):
            return _bytes(self.family.trunk_tensors(self.spec, key), self._mixture.trunk)
        if isinstance(key, HeadKey):
            return self._blocks[key.block]
        return _bytes(self.family.resident_tensors(self.spec), "bf16")


def kv_dtype_of(records: Records, options: RuntimeOptions) -> str:
    """The dtype of the KV cache. "auto" is bfloat16 where the trunk's products round activations to int8, which is
    coarser than the cache (docs/results.md, "Long contexts"); else float32."""
    if options.kv_dtype != "auto":
        return options.kv_dtype
    return "bfloat16" if FORMATS[records.formats.trunk].rounds and not options.exact else "float32"


def sizes_of(records: Records, context: int, chunk: int, kv_item: int, logits_tokens: int | None = None) -> Sizes:
    """The sizes that the plan needs: ``context`` and ``chunk`` in tokens, ``kv_item`` in bytes per cached value;
    ``logits_tokens``: see RuntimeOptions. The engine and the CLI plan with the same sizes."""
    spec = records.spec
    experts = records.experts()
    return Sizes(
        trunk={key: records.size(key) for key in records.trunks},
        expert=max((records.size(key) for key in experts), default=0),
        experts=len(experts),
        resident=records.size(ResidentKey()),
        kv=context * spec.cache_width * kv_item,
        states=2 * STATES * 4 * sum(spec.state_widths),
        workspace=workspace_bytes(spec, min(chunk, context), context),
        logits=min(chunk * spec.vocab * 4, MAX_LOGITS) if logits_tokens is None else logits_tokens * spec.vocab * 4,
    )


def work_of(records: Records) -> Work:
    """The work of one token."""
    spec, family = records.spec, records.family
    layers = [_values(family.trunk_tensors(spec, TrunkKey(layer))) for layer in range(len(spec.layers))]
    routed = [ExpertKey(layer, 0) for layer in spec.moe_layers[:1]]
    shared = 0 if spec.moe is None else 3 * spec.hidden * spec.moe.shared_width
    return Work(
        layers=len(layers),
        moe_layers=len(spec.moe_layers),
        experts=spec.experts,
        experts_per_token=spec.experts_per_token,
        expert_weights=sum(_values(family.expert_tensors(spec, key)) for key in routed),
        expert_bytes=sum(records.size(key) for key in routed),
        shared_weights=shared * len(spec.moe_layers),
        trunk_weights=sum(layers) + _values(family.resident_tensors(spec)) - shared * len(spec.moe_layers),
        head_weights=spec.vocab * spec.hidden,
        attention=sum(layer.attention.multiply_adds for layer in spec.layers),
        trunk_bytes=sum(records.size(key) for key in records.trunks),
        stored=(records.stored_share(records.experts()), records.stored_share(records.trunks)),
        formats=records.formats,
    )


def _bytes(tensors: Shapes, format: str) -> int:
    shapes = [shape for _, shape in tensors.values()]
    return int(sum(math.prod(shape) * (bits_of(format, shape[-1]) if len(shape) > 1 else 16) for shape in shapes) / 8)


def _values(tensors: Shapes) -> int:
    return sum(math.prod(shape) for _, shape in tensors.values())
