"""Options that several commands share. A group of options becomes one object of the public API."""

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
    """Options that belong together. The fields are annotated for typer; a field's value is the option's default."""

    def make(self) -> Any:
        """The object that a command gets in place of the options."""
        raise NotImplementedError


@dataclass(frozen=True)
class Memory(Group):
    """What the process may use."""

    ram: Annotated[str, Option(help="Host memory for the whole process, such as 8GiB; auto: most of what is free.")] = (
        "auto"
    )
    vram: Annotated[str | None, Option(help="Device memory; without an accelerator, host memory that plays one.")] = (
        None
    )

    def make(self) -> Budget:
        return Budget(self.ram, self.vram)


@dataclass(frozen=True)
class Sampling(Group):
    """How tokens are chosen, and when to stop."""

    max_new_tokens: Annotated[int, Option("--max-new-tokens", "-n", help="New tokens, at most.")] = 128
    temperature: Annotated[float, Option(help="0: always the likeliest token.")] = 0.0
    top_k: Annotated[int, Option(help="Keep the k likeliest tokens; 0: all.")] = 0
    top_p: Annotated[float, Option(help="Keep the likeliest tokens that together have this probability.")] = 1.0
    min_p: Annotated[float, Option(help="Drop tokens less likely than this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[float, Option(help="Above 1: tokens already in the text become less likely.")] = 1.0
    seed: Annotated[int | None, Option(help="Makes sampling repeatable.")] = None
    stop: Annotated[list[str] | None, Option(help="Text that ends the answer; may be given several times.")] = None

    def make(self) -> SamplingParams:
        return SamplingParams(**{**vars(self), "stop": tuple(self.stop or ())})


@dataclass(frozen=True)
class Loading(Group):
    """How a model is loaded and run."""

    policy: Annotated[
        str,
        Option(
            help="Eviction: default, lru or another of docs/policies.md, a FILE.json of parameters, or module:Class."
        ),
    ] = "default"
    predictor: Annotated[str, Option(help="Prefetch: gate, none, one of docs/traces.md, or module:Class.")] = "gate"
    reader: Annotated[str, Option(help="auto, direct (O_DIRECT) or mmap.")] = "auto"
    mirror: Annotated[
        list[str] | None, Option(help="A folder with copies of the files on another disk; may be given several times.")
    ] = None
    probe: Annotated[bool, Option("--probe", help="Measure the disk again; without it, only at its first use.")] = False
    no_heat: Annotated[
        bool, Option("--no-heat", help="Neither remember which experts are used most, nor warm up with them.")
    ] = False
    timeline: Annotated[
        Path | None, Option(help="Write a trace of events to this file, for ui.perfetto.dev or chrome://tracing.")
    ] = None
    exact: Annotated[
        bool, Option("--exact", help="Multiply int8 and int4 weights by activations that are not rounded: slower.")
    ] = False
    device: Annotated[str, Option(help="auto, cpu, or an accelerator as torch names it.")] = "auto"
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
    """Replace each parameter ``Annotated[made, group]`` of a command by the options of the group.

    typer reads the options from the new signature. The command gets what ``group.make`` returns.
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
