"""Models of transformers whose routed experts are served by tierlm, for families that tierlm itself does not have.

``load`` gives transformers' own model, without the experts' weights. Their modules call tierlm through transformers'
experts interface: it keeps experts in slots of the budget, and reads the others from the checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn

try:
    import transformers
    from transformers import AutoConfig, GenerationConfig, PreTrainedModel
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:
    raise ImportError(
        "tierlm.integrations.transformers needs transformers: pip install 'tierlm[transformers]'"
    ) from error

from tierlm.checkpoints.container import read_config
from tierlm.checkpoints.hub import find_model
from tierlm.config import Budget, RuntimeOptions, parse_size
from tierlm.errors import CheckpointError, UnsupportedModelError, UsageError, shown
from tierlm.files import is_folder
from tierlm.host import available_ram, process_ram
from tierlm.integrations.transformers.experts import Experts, ExpertStats
from tierlm.integrations.transformers.layout import check_experts, experts_in
from tierlm.integrations.transformers.records import ExpertRecords
from tierlm.load_request import require_memory
from tierlm.memory.opening import HOST
from tierlm.models.config_reader import Fields
from tierlm.models.quantization import published
from tierlm.planning.plan import AUTO_RAM, Plan, Sizes, make_plan
from tierlm.policies import make_policy
from tierlm.policies.eviction import TierInfo
from tierlm.policies.predictors import make_predictor
from tierlm.spec import TrunkKey

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ExpertStats", "Options", "ServedModel", "load"]

NAME = "tierlm"  # of the experts implementation
Self = TypeVar("Self", bound="ServedModel")


class Options(TypedDict, total=False):
    """The fields of ``tierlm.RuntimeOptions`` that act here. ``predictor``: one without gates; "none" by default."""

    policy: str
    predictor: str
    reader: str
    prefill_chunk: int
    exact: bool
    transfer_threads: int | None
    probe: str
    mirrors: Sequence[str | Path]
    heat: bool
    io_timeout: float
    ram_slots: int | None


class ServedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What the models of ``load`` have beside the methods of their own class. A context manager."""

    tierlm_experts: Experts
    generate: Callable[..., Any]  # of the model's own class

    def __init__(self, config: Any, *arguments: Any, **named: Any):
        super().__init__(config, *arguments, **named)
        for module in experts_in(self).values():
            for name, stack in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(stack.new_empty(0, *stack.shape[1:])))  # a stack of no experts

    def stats(self) -> ExpertStats:
        """Statistics of the experts."""
        return self.tierlm_experts.stats()

    def close(self) -> None:
        """Stop the threads, close the files and give back the experts' memory. Idempotent."""
        self.tierlm_experts.close()

    def save_pretrained(self, *arguments: Any, **named: Any) -> None:
        """Raises UsageError: the experts are not in memory."""
        raise UsageError("this model has no experts in memory and cannot be saved; copy its checkpoint instead")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    model: str | Path,
    *,
    ram: int | float | str = "auto",
    reserve: int | float | str = "512MiB",
    **options: Unpack[Options],
) -> ServedModel:
    """Load a model of transformers, whose routed experts stay on disk and in what ``ram`` has room for.

    ``model``: a folder in Hugging Face layout, or a Hub id, which is downloaded. ``ram``: bytes, or "8GiB", for the
    whole process; "auto": four fifths of the free memory. ``reserve``: of these, what transformers may use while it
    runs: KV cache, activations and logits. Everything but routed experts is loaded by transformers.

    Raises UsageError, BudgetError, CheckpointError, StorageError. After an error no thread runs and no file is open.
    """
    if unknown := sorted(options.keys() - Options.__annotations__.keys()):
        raise UsageError(f"{unknown[0]}: expected one of {', '.join(Options.__annotations__)}")
    chosen = RuntimeOptions(**{"predictor": "none", **options})  # type: ignore[arg-type]
    budget, room = Budget(ram), parse_size(reserve, "reserve")
    if not is_folder(folder := find_model(model)):
        raise UnsupportedModelError(f"{folder}: expected a folder in Hugging Face layout, found a GGUF file")
    config = _config(folder)
    made = _class_of(config, folder)
    with torch.device("meta"):
        outline = made(config)
    modules = experts_in(outline)
    if not modules:
        raise UnsupportedModelError(
            f"{folder}: {made.__name__}: expected modules that call transformers' experts interface, found none"
        )
    for name, module in modules.items():
        check_experts(name, module)
    records = ExpertRecords(folder, outline)
    width = max(_chosen(outline, name) for name in modules)
    predictor = make_predictor(chosen.predictor, width)
    if predictor.gates:
        raise UsageError(f"predictor: expected one that needs no routers, found {chosen.predictor!r}")
    make_policy(chosen.policy, TierInfo(len(records.layers), 1))
    plan = _plan(records, outline, width, chosen, budget, room)
    with ExitStack() as undo:
        experts = Experts(records, chosen, plan, predictor)
        undo.callback(experts.close)
        loaded = _load(_served(made), config, records)
        file = folder / "generation_config.json"
        if loaded.can_generate() and file.exists():
            loaded.generation_config = GenerationConfig.from_pretrained(folder)
        for layer, module in enumerate(experts_in(loaded).values()):
            module.served = partial(experts.forward, layer)
        loaded.tierlm_experts = experts
        weakref.finalize(loaded, experts.close)
        undo.pop_all()
    return loaded


def experts_forward(module: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The experts implementation "tierlm". ``hidden`` [T, n], ``experts`` and ``weights`` [T, k] -> [T, n]."""
    served = getattr(module, "served", None)
    if served is None:
        raise UsageError("these experts are not served by tierlm: load the model with tierlm.integrations.transformers")
    return served(hidden, experts, weights)  # type: ignore[no-any-return]


def _config(folder: Path) -> Any:
    """The config without its quantisation, which tierlm reads. Raises CheckpointError, UnsupportedModelError."""
    file = folder / "config.json"
    published(Fields(read_config(file), str(file)))  # refuses other quantisation
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds, by what the file holds
        raise UnsupportedModelError(f"{file}: transformers cannot read it: {error}") from error
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _class_of(config: Any, folder: Path) -> type[PreTrainedModel]:
    """The class of the config's architecture. Raises UnsupportedModelError."""
    listed = config.architectures
    name = listed[0] if isinstance(listed, list) and listed else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise UnsupportedModelError(f"{folder}: architecture {shown(name)}: expected a class of this transformers")
    return found


def _served(made: type[PreTrainedModel]) -> type[ServedModel]:
    """The same class, whose models have no experts. It has the same names, by which transformers finds what belongs to
    the class."""
    return type(made.__name__, (ServedModel, made), {"__module__": made.__module__})


def _chosen(outline: nn.Module, name: str) -> int:
    """Experts a token of the module ``name``, as its router or its block has it."""
    block = outline.get_submodule(name.rpartition(".")[0])
    return max((k for module in block.modules() if isinstance(k := getattr(module, "top_k", None), int)), default=1)


def _plan(
    records: ExpertRecords, outline: PreTrainedModel, width: int, options: RuntimeOptions, budget: Budget, room: int
) -> Plan:
    """Everything but routed experts stays; they share the rest. Raises BudgetError."""
    experts = {parameter for module in experts_in(outline).values() for parameter in module.parameters()}
    values = sum(tensor.numel() for tensor in {*outline.parameters(), *outline.buffers()} - experts)
    largest = max(records.size(key) for key in records.experts())
    hidden, inner = records.widest
    sizes = Sizes(
        trunk={TrunkKey(0): values * _dtype(outline.config).itemsize},
        expert=largest,
        experts=len(records.experts()),
        resident=0,
        kv=0,
        workspace=room + 4 * options.prefill_chunk * ((2 * width + 3) * hidden + 3 * inner),
        logits=0,
    )
    held = process_ram()
    ram = int((available_ram() + held) * AUTO_RAM) if budget.ram is None else budget.ram
    plan = make_plan(sizes, ram=ram, vram=None, process=held, min_slots=width, ram_slots=options.ram_slots)
    require_memory(plan, ram, held, HOST)
    return plan


def _load(made: type[ServedModel], config: Any, records: ExpertRecords) -> ServedModel:
    """All but the experts. Raises CheckpointError."""
    ExpertsInterface.register(NAME, experts_forward)
    dtype, where = _dtype(config), records.checkpoint.path
    with ExitStack() as files:
        try:
            found: Any = made.from_pretrained(
                None,
                config=config,
                state_dict=records.rest(files, dtype),
                dtype=dtype,
                experts_implementation=NAME,
                output_loading_info=True,
            )
        except RuntimeError as error:
            raise CheckpointError(f"{where}: transformers cannot load it: {error}") from error
    loaded, info = found
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{where}: expected tensors of {missing[0]} and {len(missing) - 1} others, found none")
    return loaded.requires_grad_(False)  # type: ignore[no-any-return]


def _dtype(config: Any) -> torch.dtype:
    found: torch.dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return found
