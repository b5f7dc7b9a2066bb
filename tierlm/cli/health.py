"""``tierlm doctor``: can this machine run this model?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument

from tierlm.cli.complete import models
from tierlm.cli.options import Json
from tierlm.cli.output import pairs, report
from tierlm.cli.packing import EXPERTS, TRUNK
from tierlm.cli.settings import config_file, variables
from tierlm.config import format_size
from tierlm.errors import (
    BudgetError,
    CheckpointError,
    ModelNotFoundError,
    TierlmError,
    UnsupportedModelError,
    UsageError,
)

if TYPE_CHECKING:
    from tierlm.models.catalog import Catalog
    from tierlm.profiling.health import Finding

COLOURS = {"ok": "green", "note": "yellow", "broken": "red"}


def doctor(
    context: typer.Context,
    model: Annotated[
        str, Argument(metavar="MODEL", help="A folder in Hugging Face layout, or 'demo'.", autocompletion=models)
    ] = "demo",
    json: Json = None,
) -> None:
    """Find what breaks or slows a model on this machine, with advice. Exit code 1: it cannot run."""
    from tierlm.checkpoints.foreign import refuse_foreign
    from tierlm.models.catalog import Catalog
    from tierlm.planning.known import find_config
    from tierlm.profiling.health import Finding, check_files, check_limits, check_machine

    findings: list[Finding] = []
    catalog = None
    try:
        named = find_config(model)
        if named.path is None:
            refuse_foreign(Path(model))
            raise CheckpointError(f"{named.where}: a config without weights; `tierlm plan` predicts what it needs")
        catalog = Catalog(named.path)
        used = sum(file.stat().st_size for file in catalog.files)
        what = f"complete: {len(catalog.checkpoint.tensors)} tensors, {format_size(used)} in {len(catalog.files)} files"
        findings.append(Finding("ok", "checkpoint", what))
    except OSError as error:
        what = f"{error.filename or model}: {error.strerror or error}"
        findings.append(Finding("broken", "checkpoint", what, "make it readable for this user, or give another model"))
    except ModelNotFoundError:
        raise
    except UnsupportedModelError as error:
        findings.append(Finding("broken", "checkpoint", str(error), "give a model that is supported"))
    except TierlmError as error:
        findings.append(Finding("broken", "checkpoint", str(error), "download the model again, or give another"))
    if catalog is not None:
        findings.append(Finding("ok", "architecture", str(named.config["model_type"])))
        findings += _text(catalog.checkpoint.path)
        findings += check_files(catalog.files)
        findings += [_protection(catalog), _budget(catalog), _packing(catalog)]
    findings += check_limits(0 if catalog is None else len(catalog.files), pins=_has_accelerator())
    findings += check_machine()
    findings += _settings(context.find_root().command)
    broken = any(finding.level == "broken" for finding in findings)
    found = {"fit": not broken, "findings": [dataclasses.asdict(finding) for finding in findings]}
    report(found, json, _table(findings))
    if broken:
        raise typer.Exit(1)


def _table(findings: list[Finding]) -> Table:
    table = pairs(())
    for finding in findings:
        text = Text(finding.what)
        if finding.todo:
            text.append(f"\n-> {finding.todo}", style="bold")
        table.add_row(Text(finding.level, style=COLOURS[finding.level]), finding.area, text)
    return table


def _text(folder: Path) -> Iterator[Finding]:
    """Check tokenizer and chat template."""
    from tierlm.profiling.health import Finding
    from tierlm.text import TextCodec

    try:
        codec = TextCodec(folder)
    except CheckpointError as error:
        yield Finding("note", "tokenizer", str(error), "`tierlm run --ids 1,2,3` works without it")
        return
    yield Finding("ok", "tokenizer", f"{codec.tokenizer.get_vocab_size()} tokens")
    try:
        codec.chat([{"role": "user", "content": "Hello"}])
    except (CheckpointError, UsageError) as error:
        yield Finding("note", "chat template", str(error), "`tierlm run --raw` works without it")
    else:
        yield Finding("ok", "chat template", "renders a message")


def _settings(commands: Any) -> Iterator[Finding]:
    """What the config file and the environment set."""
    from tierlm.profiling.health import Finding

    file = config_file()
    what = "no home folder for it" if file is None else str(file) if file.exists() else f"none at {file}"
    yield Finding("ok", "config file", what)
    for name, is_known in variables(commands):
        if is_known:
            yield Finding("ok", "environment", f"{name} is set")
        else:
            yield Finding("note", "environment", f"{name} is no option of a command", f"unset {name}")


def _protection(catalog: Catalog) -> Finding:
    """Say which damage is found."""
    from tierlm.profiling.health import Finding

    if catalog.sealed:
        return Finding("ok", "checksums", "every record is compared with its checksum when it is first read")
    what = "the files have no checksums: bytes that change on the disk or during a run are not noticed, only a file"
    what += " of another size, time or inode when it is opened or when a read fails"
    return Finding("note", "checksums", what, "keep the files as they are during a run; `tierlm pack` adds checksums")


def _packing(catalog: Catalog) -> Finding:
    """Say what memory ``tierlm pack`` needs."""
    from tierlm.host import available_ram
    from tierlm.models.packing import least_memory
    from tierlm.planning.forecast import PROCESS
    from tierlm.profiling.health import Finding

    need, free = least_memory(catalog, EXPERTS, TRUNK, PROCESS), available_ram()
    what = f"`tierlm pack` needs --ram {format_size(need)} for experts {EXPERTS} and trunk {TRUNK}"
    if need > free:
        return Finding("note", "packing", f"{what}; {format_size(free)} are free", "free memory before packing")
    return Finding("ok", "packing", what)


def _budget(catalog: Catalog) -> Finding:
    """Check that the model runs with --ram auto."""
    from tierlm.config import DEFAULT_CONTEXT, RuntimeOptions
    from tierlm.host import available_ram
    from tierlm.models.outline import KV_BYTES, kv_dtype_of, sizes_of
    from tierlm.planning.forecast import PROCESS
    from tierlm.planning.plan import AUTO_RAM, make_plan
    from tierlm.profiling.health import Finding

    spec, ram = catalog.spec, int(available_ram() * AUTO_RAM)
    options, context = RuntimeOptions(), min(spec.max_position, DEFAULT_CONTEXT)
    sizes = sizes_of(catalog, context, options.prefill_chunk, KV_BYTES[kv_dtype_of(catalog, options)])
    try:
        plan = make_plan(sizes, ram=ram, vram=None, process=PROCESS, min_slots=spec.experts_per_token).ram
    except BudgetError as error:
        return Finding("broken", "budget", str(error), "free memory, lower --context, or use another machine")
    what = f"--ram auto would be {format_size(ram)}: {plan.expert_slots} of {sizes.experts} experts have slots"
    return Finding("ok", "budget", f"{what}; floor {format_size(plan.floor)}")


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
