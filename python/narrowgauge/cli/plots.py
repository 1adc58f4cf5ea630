"""The pictures the commands draw. Importing this needs matplotlib."""

from __future__ import annotations

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


def plot_speedups(result: dict[str, Any], path: Path) -> None:
    """One bar per case and contestant: how many times faster ours is, with the spread over rounds."""
    cases = result["cases"]
    rivals = list(dict.fromkeys(name for case in cases for name in case["speedups"]))
    colors = {rival: f"C{index % 10}" for index, rival in enumerate(rivals)}
    bars = sum(len(case["speedups"]) for case in cases)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.13 * (bars + len(cases))), layout="constrained")
    place, middles = 0.0, []
    for case in cases:
        first = place
        for rival, spread in case["speedups"].items():
            reach = [[spread["median"] - spread["p20"]], [spread["p80"] - spread["median"]]]
            axes.barh(  # from 1, the tie, to either side
                place, spread["median"] - 1, 0.9, left=1.0, xerr=reach, error_kw={"linewidth": 0.8},
                color=colors[rival],
            )  # fmt: skip
            place += 1
        middles.append((first + place - 1) / 2)
        place += 1  # a gap between cases
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_yticks(middles, [case["name"] for case in cases], fontsize=6)
    axes.set_ylim(place, -1.5)
    axes.set_xlabel("times faster (right of 1: ours is faster)")
    axes.legend(
        handles=[Patch(color=colors[rival], label=f"against {rival}") for rival in rivals], fontsize=7
    )
    save(figure, path)
