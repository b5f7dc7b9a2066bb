"""Options shared by several commands. A group of options becomes one object of the public API."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

from typer import Argument, Option

from tierlm.cli.complete import models, policies, predictors, readers
from tierlm.cli.output import log_to_stderr
from tierlm.config import Budget, LoadOptions, SamplingParams

Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A folder in Hugging Face layout, a GGUF file, a Hub id (ORG/NAME, ORG/NAME@REVISION, ORG/NAME:Q4_K_M), "
        "or 'demo'.",
        autocompletion=models,
    ),
]
Json = Annotated[
    Path | None,
    Option("--json", metavar="FILE", help="Write the result as JSON; '-': to stdout, and nothing else there."),
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress and no notes on stderr.")]


@dataclass(frozen=True)
class Group:
    """A group of options. Fields are annotated for typer; a field's value is the option's default."""

    panel: ClassVar[str]  # its heading in the help

    def make(self) -> Any:
        """The object that the command receives instead of the options."""
        raise NotImplementedError


@dataclass(frozen=True)
class Memory(Group):
    """The memory budget."""

    panel: ClassVar[str] = "Memory"

    ram: Annotated[
        str, Option(metavar="SIZE", help="Memory of the whole process, e.g. 8GiB; auto: most of what is free.")
    ] = "auto"
    vram: Annotated[
        str | None, Option(metavar="SIZE", help="Memory of the card; without a card, more host memory.")
    ] = None

    def make(self) -> Budget:
        return Budget(self.ram, self.vram)


@dataclass(frozen=True)
class Sampling(Group):
    """Sampling and stop conditions. Where none is given, `run` and `chat` take what the model recommends."""

    panel: ClassVar[str] = "Sampling"

    max_new_tokens: Annotated[
        int, Option("--max-new-tokens", "--n-predict", "-n", metavar="N", help="Maximum number of new tokens.")
    ] = 128
    temperature: Annotated[
        float | None, Option("--temperature", "--temp", metavar="X", help="0: always the most likely token.")
    ] = None
    top_k: Annotated[int | None, Option(metavar="N", help="Keep the N most likely tokens; 0: all.")] = None
    top_p: Annotated[float | None, Option(metavar="X", help="Keep the most likely tokens up to this probability.")] = (
        None
    )
    min_p: Annotated[
        float | None, Option(metavar="X", help="Drop tokens below this share of the highest probability.")
    ] = None
    repetition_penalty: Annotated[
        float | None, Option(metavar="X", help="Above 1: tokens in the text become less likely.")
    ] = None
    seed: Annotated[int | None, Option(metavar="N", help="Makes sampling reproducible.")] = None
    stop: Annotated[list[str] | None, Option(metavar="TEXT", help="Text that ends the answer; repeatable.")] = None

    def make(self) -> dict[str, Any]:
        """The fields of SamplingParams that the user has given."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        SamplingParams(**given)  # checks them
        return given


@dataclass(frozen=True)
class Loading(Group):
    """Loading and runtime options."""

    panel: ClassVar[str] = "Loading and running"

    context: Annotated[
        int | None,
        Option(
            "--context", "--ctx-size", "-c", metavar="N", help="Tokens to reserve KV memory for; default: up to 4096."
        ),
    ] = None
    threads: Annotated[int | None, Option(metavar="N", help="Compute threads; default: one for each fast core.")] = None
    device: Annotated[str, Option(metavar="NAME", help="auto, cpu, or torch's name of an accelerator.")] = "auto"
    policy: Annotated[
        str,
        Option(
            metavar="NAME",
            help="Eviction: default, another of docs/policies.md, FILE.json, or module:Class.",
            autocompletion=policies,
        ),
    ] = "default"
    predictor: Annotated[
        str,
        Option(
            metavar="NAME",
            help="Prefetch: gate, none, one of docs/traces.md, or module:Class.",
            autocompletion=predictors,
        ),
    ] = "gate"
    speculation: Annotated[
        str,
        Option(
            metavar="NAME",
            help="Draft tokens where it pays: lookup, from the text so far; mtp, by the model's layer; off.",
        ),
    ] = "off"
    reader: Annotated[
        str, Option(metavar="NAME", help="auto, direct (O_DIRECT) or mmap (the page cache).", autocompletion=readers)
    ] = "auto"
    kv_dtype: Annotated[
        str,
        Option(metavar="NAME", help="KV cache: bfloat16, float32; auto: bfloat16 with int8, int4 and GGUF weights."),
    ] = "auto"
    mirror: Annotated[
        list[str] | None, Option(metavar="FOLDER", help="Copies of the files on another disk; repeatable.")
    ] = None
    probe: Annotated[bool, Option("--probe", help="Measure the disk again, not only at its first use.")] = False
    no_heat: Annotated[bool, Option("--no-heat", help="Neither use nor remember which experts are used most.")] = False
    timeline: Annotated[
        Path | None, Option(metavar="FILE", help="Write events for ui.perfetto.dev or chrome://tracing.")
    ] = None
    exact: Annotated[
        bool, Option("--exact", help="Multiply quantised weights by activations that are not rounded: slower.")
    ] = False

    def make(self) -> LoadOptions:
        return LoadOptions(
            device=self.device,
            policy=self.policy,
            predictor=self.predictor,
            speculation=self.speculation,
            reader=self.reader,
            kv_dtype=self.kv_dtype,
            context=self.context,
            threads=self.threads,
            exact=self.exact,
            probe="refresh" if self.probe else "auto",
            mirrors=tuple(self.mirror or ()),
            heat=not self.no_heat,
            timeline=self.timeline,
        )


@dataclass(frozen=True)
class Stored(Group):
    """KV values on disk, of commands whose prompts go on from earlier ones."""

    panel: ClassVar[str] = "KV values on disk"

    kv_disk: Annotated[
        str | None,
        Option(
            "--kv-disk", metavar="SIZE", help="Store KV values on disk, too, at most SIZE, for later prompts and runs."
        ),
    ] = None
    kv_folder: Annotated[
        Path | None, Option("--kv-folder", metavar="DIR", help="Where; default: in the user's cache folder.")
    ] = None
    kv_format: Annotated[
        str, Option("--kv-format", metavar="NAME", help="exact, or int8: smaller, and not quite the same.")
    ] = "exact"

    def make(self) -> LoadOptions:
        return LoadOptions(kv_disk=self.kv_disk, kv_folder=self.kv_folder, kv_format=self.kv_format)


@dataclass(frozen=True)
class Messages(Group):
    """What is said on standard error. The command receives whether to be quiet."""

    panel: ClassVar[str] = "Messages"

    quiet: Quiet = False
    verbose: Annotated[bool, Option("--verbose", "-v", help="Log the plan, the disks and the steps to stderr.")] = False

    def make(self) -> bool:
        if self.verbose:
            log_to_stderr()
        return self.quiet


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
            parameter.replace(name=name, annotation=_under(group.panel, hints[name]), default=default)
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


def _under(panel: str, annotation: Any) -> Any:
    """The annotation of an option, whose help appears under ``panel``."""
    kind, option = get_args(annotation)
    option = copy.copy(option)
    option.rich_help_panel = panel
    return Annotated[kind, option]
