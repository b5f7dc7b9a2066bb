"""The figures of bench/policies.py: readable in print and without colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from tierlm.tracing.trace import Trace

# Okabe and Ito's palette suits most colour-blind readers; markers and dashes suit print.
STYLES: list[dict[str, Any]] = [
    {"color": "#000000", "marker": "o", "linestyle": "-"},
    {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    {"color": "#009E73", "marker": "D", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
    {"color": "#E69F00", "marker": "X", "linestyle": "-"},
]
MOST = 7  # lines in one figure; the heat map has the others


def draw(
    folder: Path,
    trace: Trace,
    title: str,
    fractions: list[float],
    hits: dict[str, list[float]],
    speeds: dict[str, list[float]],
) -> None:
    """Write four PNGs into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    best = sorted((name for name in hits if name not in ("belady", "lru")), key=lambda name: -sum(hits[name]))
    lines = {name: hits[name] for name in ["belady", *best[: MOST - 2], "lru"]}
    _curves(folder / "hit-rate.png", f"{title}: hit rate, cold start included", "hit rate, %", fractions, lines, 100)
    _curves(folder / "speed.png", f"{title}: simulated decode", "tokens/s", fractions, speeds, 1)
    _regret(folder / "regret.png", title, fractions, hits)
    _reuse(folder / "reuse.png", title, trace)


def _curves(
    file: Path, title: str, unit: str, fractions: list[float], lines: dict[str, list[float]], scale: float
) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, values), style in zip(lines.items(), STYLES, strict=False):
        axes.plot([100 * f for f in fractions], [scale * value for value in values], label=name, markersize=5, **style)
    axes.set(title=title, xlabel="experts in the cache, % of all", ylabel=unit)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    _save(figure, file)


def _regret(file: Path, title: str, fractions: list[float], hits: dict[str, list[float]]) -> None:
    """Points of hit rate below Belady's."""
    names = sorted((name for name in hits if name != "belady"), key=lambda name: -sum(hits[name]))
    points = 100 * (np.array(hits["belady"]) - np.array([hits[name] for name in names]))
    figure, axes = plt.subplots(figsize=(6, 0.32 * len(names) + 1.4), layout="constrained")
    image = axes.imshow(points, cmap="cividis_r", aspect="auto", vmin=0)
    axes.set_xticks(range(len(fractions)), [f"{100 * fraction:g}" for fraction in fractions])
    axes.set_yticks(range(len(names)), names)
    for (row, column), value in np.ndenumerate(points):
        dark = value > points.max() * 0.55
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
    axes.set(title=f"{title}: points of hit rate below Belady", xlabel="experts in the cache, % of all")
    figure.colorbar(image, label="points")
    _save(figure, file)


def _reuse(file: Path, title: str, trace: Trace) -> None:
    """By layer: tokens until a record is used again, and how unevenly experts are used."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    colours = plt.get_cmap("cividis")(np.linspace(0, 0.95, trace.moe_layers))
    for layer, colour in enumerate(colours):
        ids = trace.experts[:, layer]
        used = np.zeros((len(trace), trace.info.experts), bool)
        rows, choices = np.nonzero(ids >= 0)
        used[rows, ids[rows, choices]] = True
        gaps = np.concatenate([np.diff(np.flatnonzero(column)) for column in used.T])
        shares = np.sort(used.mean(0))[::-1]
        if len(gaps):
            left.plot(np.sort(gaps), np.linspace(0, 100, len(gaps)), color=colour, linewidth=1)
        right.plot(100 * np.arange(1, len(shares) + 1) / len(shares), 100 * shares, color=colour, linewidth=1)
    left.set_xscale("log")
    left.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    left.set(xlabel="tokens until the next use", ylabel="% of uses, at most", title="reuse distance")
    right.set(xlabel="experts by rank, % of a layer's", ylabel="% of tokens that use it", title="popularity")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}, a line a layer")
    bar = plt.cm.ScalarMappable(plt.Normalize(1, trace.moe_layers), matplotlib.colors.ListedColormap(colours))
    figure.colorbar(bar, ax=right, label="MoE layer")
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110)
    plt.close(figure)
