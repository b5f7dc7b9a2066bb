"""The plot of bandwidth against capacity: this machine's tiers, reference hardware, and lines of equal tokens a second.
Needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tierlm.errors import UsageError
from tierlm.planning.cost import Work
from tierlm.profiling.profile import Profile

HARDWARE = Path(__file__).with_name("hardware.json")  # name, kind, bytes a second, bytes, source
KINDS = {
    "device": ("#7b6fb0", "cards"),
    "unified": ("#b07a3f", "unified memory"),
    "memory": ("#5f8f6a", "host memory"),
    "storage": ("#6b8299", "storage"),
}
TOKENS = (0.1, 1, 10, 100)
# Label offsets in points; the others are to the right of the mark.
PLACES = {
    "RTX 4060": (-46, -3),
    "V100 16 GB": (-56, -3),
    "RTX 4060 Ti 16 GB": (-44, 7),
    "RTX 4090": (5, 5),
    "DGX Spark": (7, 3),
    "Ryzen AI Max+ 395": (7, -11),
    "external KV storage": (-88, 6),
    "Mac Studio Max": (7, 0),
}


def hardware() -> list[dict[str, Any]]:
    """The reference hardware, with published bandwidths, which are never quite reached."""
    found: list[dict[str, Any]] = json.loads(HARDWARE.read_text(encoding="utf-8"))
    return found


def draw(file: Path, profile: Profile, model: str, work: Work, model_bytes: int) -> None:
    """Write the plot to ``file``. Raises UsageError without matplotlib or if ``file`` cannot be written."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise UsageError("a plot needs matplotlib: pip install tierlm[plot]") from error
    figure, axes = pyplot.subplots(figsize=(11, 6.4), layout="constrained")
    axes.set(xscale="log", yscale="log", xlim=(2e5, 4e14), ylim=(2e8, 9e12))
    for row in hardware():
        if row["kind"] == "link":
            axes.axhline(row["bandwidth"], color="#cccccc", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
            axes.text(3.6e14, row["bandwidth"] * 1.05, row["name"], fontsize=7.5, color="#999999", ha="right")
            continue
        colour, _ = KINDS[row["kind"]]
        axes.plot(row["capacity"], row["bandwidth"], "o", color=colour, alpha=0.55, markersize=6, zorder=2)
        axes.annotate(
            row["name"],
            (row["capacity"], row["bandwidth"]),
            PLACES.get(row["name"], (7, -3)),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
    token = model_bytes / max(1, work.moe_layers * work.experts * work.expert_weights) * work.active_weights
    for speed in TOKENS:
        axes.axhline(speed * token, color="#c23b22", linewidth=0.9, alpha=0.55, zorder=1)
        if axes.get_ylim()[0] < speed * token < axes.get_ylim()[1]:
            axes.text(4.4e14, speed * token, f"{speed:g} tokens/s", fontsize=8, color="#c23b22", va="center")
    axes.axvline(model_bytes, color="#c23b22", linewidth=0.9, linestyle="--", alpha=0.7, zorder=1)
    axes.text(
        model_bytes * 1.1, 2.4e8, f"{model}: {model_bytes / 1e9:.0f} GB,\n{token / 1e9:.1f} GB a token", fontsize=8,
        color="#c23b22",
    )  # fmt: skip
    points = tiers(profile)
    for name, (capacity, bandwidth) in points.items():
        axes.plot(capacity, bandwidth, "D", color="#111111", markersize=7, zorder=4)
        axes.annotate(
            f"{name}\n{bandwidth / 1e9:.3g} GB/s",
            (capacity, bandwidth),
            (0, -28),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
            zorder=5,
        )
    line = sorted(points.values())
    axes.plot([c for c, _ in line], [b for _, b in line], color="#111111", linewidth=1, alpha=0.5, zorder=3)
    axes.set(xlabel="capacity, bytes", ylabel="bandwidth, bytes/s")
    axes.set_title(f"Bandwidth against capacity: {profile.processor}, {profile.cores} cores", loc="left", fontsize=11)
    marks = [Line2D([], [], marker="D", color="#111111", linestyle="-", label="this machine, measured")]
    marks += [
        Line2D([], [], marker="o", color=colour, alpha=0.6, linestyle="", label=f"{what}, as published")
        for colour, what in KINDS.values()
    ]
    what = f"{model}, tokens/s if all active weights\nwere read from there for each token"
    marks.append(Line2D([], [], color="#c23b22", alpha=0.6, label=what))
    axes.legend(handles=marks, fontsize=8, frameon=False, loc="lower left")
    ticks = {10**power: name for power, name in zip((6, 9, 12), ("1 MB", "1 GB", "1 TB"), strict=True)}
    axes.set_xticks(list(ticks), list(ticks.values()))
    rates = {10**power: name for power, name in zip((9, 10, 11, 12), ("1", "10", "100", "1000"), strict=True)}
    axes.set_yticks(list(rates), [f"{name} GB/s" for name in rates.values()])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be written: {error}") from error
    finally:
        pyplot.close(figure)


def tiers(profile: Profile) -> Mapping[str, tuple[int, float]]:
    """This machine's points: name -> (bytes, bytes a second read), each by its fastest read."""
    found: dict[str, tuple[int, float]] = {}
    for rate in profile.memory:
        capacity = rate.capacity or profile.ram
        if rate.cpus == rate.node:
            found[rate.name] = max(found.get(rate.name, (0, 0.0)), (capacity, rate.read.median))
    if "device memory" in profile.links:
        found["device"] = profile.device_memory, profile.links["device memory"].median
    for path, capacity in profile.disk_capacity.items():
        real = [r.rate.median for r in profile.disks if r.path == path and not r.from_ram and r.pattern == "random"]
        if real:
            found[f"disk {path}" if len(profile.disk_capacity) > 1 else "disk"] = capacity, max(real)
    return found
