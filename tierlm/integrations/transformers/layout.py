"""The experts modules of a model of transformers, and where a checkpoint has their parameters.

Names in files become names of parameters by transformers' own mapping of checkpoints.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from tierlm.checkpoints.checkpoint import Checkpoint
from tierlm.checkpoints.record import TensorInfo
from tierlm.errors import CheckpointError, UnsupportedModelError
from tierlm.formats import FORMATS

GATE_UP, DOWN = "gate_up_proj", "down_proj"
SUFFIXES = {format.suffix for format in FORMATS.values() if format.loadable}  # of the name of a weight's data


def experts_in(model: nn.Module) -> dict[str, Any]:
    """The modules of ``model`` that call the experts interface, by name."""
    interface = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, a) for a in interface)}


def check_experts(name: str, module: Any) -> None:
    """Raises UnsupportedModelError unless the experts of ``module`` are SwiGLUs without biases, with matrices [out, in]
    and gate before up."""
    what = f"{name} ({type(module).__name__})"
    shapes = {parameter: tuple(value.shape) for parameter, value in module.named_parameters()}
    experts, double, hidden = shapes.get(GATE_UP, (0, 0, 0))
    unlike = {
        "no gate": not module.has_gate,
        "biases": module.has_bias,
        "transposed matrices": module.is_transposed,
        "gate and up interleaved": not module.is_concatenated,
        "a norm after each expert": getattr(module, "has_post_expert_norm", False),
        f"parameters {shapes}": shapes != {GATE_UP: (experts, double, hidden), DOWN: (experts, hidden, double // 2)},
    }
    if not any(unlike.values()):
        values = torch.cat((torch.linspace(-9, 9, 37), torch.linspace(-999, 999, 37)))
        gate, up = torch.cartesian_prod(values, values).T
        computed = module._apply_gate(torch.cat((gate, up))[None])[0]
        unlike["another activation"] = not torch.allclose(computed, functional.silu(gate) * up)
    if found := ", ".join(name for name, wrong in unlike.items() if wrong):
        raise UnsupportedModelError(
            f"{what}: expected experts that are {DOWN}(silu(gate) * up) without biases, found {found}"
        )


@dataclass(frozen=True)
class Source:
    """Where a parameter is. ``names``: of its matrices, which join to rows; for each its tensors by expert, or if
    ``stacked`` one of all experts."""

    names: tuple[tuple[str, ...], ...]
    stacked: bool


class Layout:
    """The parameters of ``outline``, a model on the meta device, and their tensors in ``checkpoint``.

    ``layers``: the names of the experts modules. ``shapes``: of all parameters and buffers. ``sources``: of the
    parameters of experts. Raises CheckpointError, UnsupportedModelError.
    """

    def __init__(self, outline: PreTrainedModel, checkpoint: Checkpoint):
        self.layers = list(experts_in(outline))
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()
        }
        mapping = get_model_conversion_mapping(outline)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = outline.base_model_prefix
        wanted = {f"{layer}.{name}" for layer in self.layers for name in (GATE_UP, DOWN)}
        found: defaultdict[str, defaultdict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key, tensor in sorted(checkpoint.tensors.items(), key=lambda item: _natural(item[0])):
            for base, target, pattern in self.targets(key, tensor):
                if target in wanted:
                    found[target][pattern].append(base)
        self.sources = {target: self._source(target, found[target], str(checkpoint.path)) for target in sorted(wanted)}

    def targets(self, key: str, tensor: TensorInfo) -> list[tuple[str, str, str | None]]:
        """What ``tensor``, found as ``key``, may be the data of: the weight's key, the parameter, and the pattern of
        its converter, None if it is the parameter itself."""
        found = []
        for suffix in SUFFIXES:
            if tensor.name.endswith(suffix):
                target, pattern = self._target(tensor.name.removesuffix(suffix))
                found.append((key.removesuffix(suffix), target, pattern))
        return found

    def _target(self, name: str) -> tuple[str, str | None]:
        shapes: dict[str, Any] = self.shapes
        found = rename_source_key(name, self._renamings, self._converters, self._prefix, shapes)
        if found[0] not in shapes and name in shapes:
            return rename_source_key(name, [], [], self._prefix, shapes)
        return found

    def _source(self, target: str, found: Mapping[str | None, list[str]], where: str) -> Source:
        experts = self.shapes[target][0]
        if not found:
            raise CheckpointError(f"{where}: expected the tensors of {target}, found none")
        if set(found) == {None} and len(found[None]) == 1:
            return Source(((found[None][0],),), stacked=True)
        for converter in self._converters:
            if set(converter.source_patterns) == set(found):
                names = tuple(tuple(found[pattern]) for pattern in converter.source_patterns)
                if not _joins(converter, len(names)):
                    break
                if {len(each) for each in names} != {experts}:
                    counts = [len(each) for each in names]
                    raise CheckpointError(
                        f"{where}: {target}: expected the tensors of {experts} experts, found {counts}"
                    )
                return Source(names, stacked=False)
        raise UnsupportedModelError(
            f"{where}: {target}: expected one tensor of all experts, or gate_proj, up_proj and down_proj of each; "
            f"found {sorted(map(str, found))}"
        )


def _joins(converter: WeightConverter, matrices: int) -> bool:
    """Whether ``converter`` stacks experts, and joins the rows of several matrices."""
    first, *others = converter.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    joins = [isinstance(operation, Concatenate) and operation.dim == 1 for operation in others]
    return stacks and joins == [True] * (matrices > 1)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
