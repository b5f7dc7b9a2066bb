"""Options shared by several commands. A group of options becomes one object of the public API."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from typer import Argument, Option

from tierlm.config import Budget, LoadOptions, SamplingParams

Model = Annotated[str, Argument(help="A folder in Hugging Face layout, a hub id, or 'demo'.")]


@dataclass(frozen=True)
class Group:
    """A group of options. Fields are annotated for typer; a field's value is the option's default."""

    def make(self) -> Any:
        """The object that the command receives instead of the options."""
        raise NotImplementedError


@dataclass(frozen=True)
class Memory(Group):
    """The memory budget."""

    ram: Annotated[str, Option(help="Host memory of the whole process, e.g. 8GiB; auto: most of the free memory.")] = (
        "auto"
    )
    vram: Annotated[str | None, Option(help="Device memory; emulated in host memory without an accelerator.")] = None

    def make(self) -> Budget:
        return Budget(self.ram, self.vram)


@dataclass(frozen=True)
class Sampling(Group):
    """Sampling and stop conditions."""

    max_new_tokens: Annotated[int, Option("--max-new-tokens", "-n", help="Maximum number of new tokens.")] = 128
    temperature: Annotated[float, Option(help="0: always the most likely token.")] = 0.0
    top_k: Annotated[int, Option(help="Keep the k most likely tokens; 0: all.")] = 0
    top_p: Annotated[float, Option(help="Keep the most likely tokens up to this total probability.")] = 1.0
    min_p: Annotated[float, Option(help="Drop tokens below this share of the highest probability.")] = 0.0
    repetition_penalty: Annotated[float, Option(help="Above 1: tokens already in the text become less likely.")] = 1.0
    seed: Annotated[int | None, Option(help="Makes sampling reproducible.")] = None
    stop: Annotated[list[str] | None, Option(help="Text that ends the answer; repeatable.")] = None

    def make(self) -> SamplingParams:
        return SamplingParams(**{**vars(self), "stop": tuple(self.stop or ())})


@dataclass(frozen=True)
class Loading(Group):
    """Loading and runtime options."""

    policy: Annotated[
        str, Option(help="Eviction: default, lru, another of docs/policies.md, a FILE.json, or module:Class.")
    ] = "default"
    predictor: Annotated[str, Option(help="Prefetch: gate, none, one of docs/traces.md, or module:Class.")] = "gate"
    reader: Annotated[str, Option(help="auto, direct (O_DIRECT) or mmap (the page cache).")] = "auto"
    mirror: Annotated[
        list[str] | None, Option(help="A folder with copies of the files on another disk; repeatable.")
    ] = None
    probe: Annotated[bool, Option("--probe", help="Measure the disk again, not only at its first use.")] = False
    no_heat: Annotated[
        bool, Option("--no-heat", help="Do not remember the most used experts, nor warm up with them.")
    ] = False
    timeline: Annotated[
        Path | None, Option(help="Write a timeline of events to this file, for ui.perfetto.dev or chrome://tracing.")
    ] = None
    exact: Annotated[
        bool, Option("--exact", help="Multiply int8 and int4 weights by unrounded activations: slower.")
    ] = False
    device: Annotated[str, Option(help="auto, cpu, or torch's name of an accelerator.")] = "auto"
    context: Annotated[
        int | None, Option(help="Tokens to reserve KV memory for; default: the model's, up to 4096.")
    ] = None

    def make(self) -> LoadOptions:
        return LoadOptions(
            device=self.device,
            policy=self.policy,
            predictor=self.predictor,
            reader=self.reader,
            context=self.context,
            exact=self.exact,
            probe="refresh" if self.probe else "auto",
            mirrors=tuple(self.mirror or ()),
            heat=not self.no_heat,
            timeline=self.timeline,
        )


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter ``Annotated[type, group]`` of a command with the options of the group.

    typer reads the options from the new signature. The command receives the result of ``group.make``.
    """
    groups: dict[str, Group] = {}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = next((part for part in get_args(parameter.annotation) if isinstance(part, Group)), None)
        if group is None:
            options.append(parameter)
            continue
        groups[parameter.name] = group
        hints = get_type_hints(type(group), include_extras=True)
        options += [
            parameter.replace(name=name, annotation=hints[name], default=default)
            for name, default in vars(group).items()
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: replace(group, **{field.name: given.pop(field.name) for field in fields(group)}).make()
            for name, group in groups.items()
        }
        command(**given, **made)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run
