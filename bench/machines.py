"""Predicted decode speeds of published models on common machines: the table of docs/planning.md.

    python bench/machines.py --format int4

Nothing is measured. Rates come from tierlm/profiling/hardware.json (a disk reaches 85 %, a link 80 %), otherwise from
the cost model's assumptions. Each cell has an NVMe disk of PCIe 3.0 / 4.0 / 5.0. "-": below the floor. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from tierlm.errors import BudgetError
from tierlm.models.outline import Outline, sizes_of, work_of
from tierlm.planning.cost import Accelerator
from tierlm.planning.forecast import Question, forecast
from tierlm.planning.known import known_models
from tierlm.planning.plan import AUTO_RAM
from tierlm.profiling.picture import hardware
from tierlm.profiling.profile import machine_of

CARDS = {"RTX 4060": ("8 GB", 0.5), "RTX 4060 Ti 16 GB": ("16 GB", 0.5), "RTX 4090": ("24 GB", 1.0)}  # lanes of 16
RAMS = (32, 64, 128)  # GB
DISK_SHARE, LINK_SHARE, MEMORY_SHARE, PRODUCT_SHARE, AUTO_VRAM = 0.85, 0.8, 0.7, 0.3, 0.9
CONTEXT, CHUNK = 4096, 512


def speeds(name: str, format: str | None) -> list[dict[str, object]]:
    """For each card and amount of RAM, decode tokens/s with each generation of disk."""
    outline = Outline(known_models()[name]["config"], name, format)
    sizes, work = sizes_of(outline, CONTEXT, CHUNK, 4), work_of(outline)
    parts = {row["name"]: row for row in hardware()}
    link = parts["PCIe 4.0 x16"]["bandwidth"] * LINK_SHARE
    disks = sorted((r for r in parts.values() if "generation" in r), key=lambda r: r["generation"])
    found = []
    for card, (_, lanes) in CARDS.items():
        of = parts[card]
        accelerator = Accelerator(of["bandwidth"] * MEMORY_SHARE, link * lanes, of["products"] * PRODUCT_SHARE)
        for ram in RAMS:
            question = Question(int(ram * 1e9 * AUTO_RAM), int(of["capacity"] * AUTO_VRAM), CONTEXT, 512, CHUNK)
            cell: list[tuple[float, float] | None] = []
            for disk in disks:
                base = machine_of(None, vram=True)
                machine = dataclasses.replace(base, disk=disk["bandwidth"] * DISK_SHARE, accelerator=accelerator)
                try:
                    answer = forecast(sizes, work, machine, question)
                except BudgetError:
                    cell.append(None)
                else:
                    cell.append((answer.worst.decode, answer.typical.decode))
            found.append({"model": name, "format": outline.format, "card": card, "ram": ram, "decode": cell})
    return found


def _shown(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"{pair[1]:.0f}" if pair[1] >= 10 else f"{pair[1]:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int4", help="of all models; 'published': as each is published")
    parser.add_argument("models", nargs="*", help="default: all known models")
    args = parser.parse_args()
    format = None if args.format == "published" else args.format
    rows = [row for name in args.models or known_models() if name != "DeepSeek-R1" for row in speeds(name, format)]
    print("| model | card | " + " | ".join(f"{ram} GB RAM" for ram in RAMS) + " |")
    print("|---|---|" + "---|" * len(RAMS))
    for at in range(0, len(rows), len(RAMS)):
        group = rows[at : at + len(RAMS)]
        cells = [" / ".join(_shown(pair) for pair in row["decode"]) for row in group]
        name = f"{group[0]['model']} {group[0]['format']}"
        print(f"| {name} | {CARDS[group[0]['card']][0]} | " + " | ".join(cells) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
