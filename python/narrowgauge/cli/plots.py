"""The pictures the commands draw. Importing this needs matplotlib."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from narrowgauge.cli.files import write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch


def save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    plt.close(figure)


def smooth(values: list[float], window: int = 10) -> np.ndarray:
    """Means over the last `window` values, fewer at the beginning."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_losses(result: dict[str, Any], path: Path) -> None:
    """Both loss curves of a demo: every step faint, the running mean on top."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = (("tab:gray", "-", 3.0), ("tab:orange", "--", 1.5))  # ours dashed on top, so that both show
    for (name, run), (color, line, width) in zip(result["runs"].items(), styles, strict=True):
        axes.plot(run["losses"], color=color, alpha=0.25, linewidth=0.8)
        axes.plot(smooth(run["losses"]), line, color=color, linewidth=width, label=name)
    options = result["options"]
    kind = ", ".join(filter(None, (options["dtype"], options["linear"], f"{options['state_dtype']} states")))
    axes.set_title(f"Byte-level Llama on the Python standard library ({kind})", fontsize=10)
    axes.set_xlabel("step" + (" (stopped early)" if result["partial"] else ""))
    axes.set_ylabel("training loss, nats per byte")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


CASES_PER_PANEL = 70


def plot_speedups(result: dict[str, Any], path: Path) -> None:
    """One line per case, one mark per contestant: how many times faster ours is, with the spread over rounds."""
    cases = result["cases"]
    counts = Counter(name for case in cases for name in case["speedups"])
    common = [name for name in counts if 4 * counts[name] >= len(cases)]
    colors = {name: f"C{index}" for index, name in enumerate(common)}
    panels = [cases[i : i + CASES_PER_PANEL] for i in range(0, len(cases), CASES_PER_PANEL)] or [[]]
    height = 1.2 + 0.14 * max(map(len, panels))
    figure, grid = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), height), squeeze=False, sharex=True, layout="constrained"
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        for place, case in enumerate(panel):
            for name, spread in case["speedups"].items():
                color = colors.get(name, "tab:gray")
                axes.plot([spread["p20"], spread["p80"]], [place, place], color=color, linewidth=1)
                axes.plot(spread["median"], place, "o", color=color, markersize=3)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log")
        ticks = (0.25, 0.5, 1, 2, 4, 8, 16)
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.set_yticks(range(len(panel)), [case["name"] for case in panel], fontsize=6)
        axes.set_ylim(len(panel), -1)
        axes.grid(alpha=0.3)
        axes.set_xlabel("times faster (right of 1: ours is faster)")
    handles = [Patch(color=color, label=f"against {name}") for name, color in colors.items()]
    if len(counts) > len(common):
        handles.append(Patch(color="tab:gray", label="against others"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=7)
    save(figure, path)
