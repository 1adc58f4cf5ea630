"""Cross-entropy with its gradient, alone and with the last linear layer, and the memory of the latter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import narrowgauge.nn.functional as ng
from bench.harness import OURS, Call, Case, Contest, Setting

Loss = Callable[[Tensor], Tensor]


def _build(rows: int, classes: int, dtype: torch.dtype, smoothing: float) -> Callable[[Setting], Contest]:
    def build(setting: Setting) -> Contest:
        logits = setting.random(rows, classes, dtype=dtype, requires_grad=True)
        target = torch.randint(classes, (rows,), device=setting.device)

        def eager(x: Tensor) -> Tensor:
            return F.cross_entropy(x, target, label_smoothing=smoothing)

        def ours(x: Tensor) -> Tensor:
            loss = ng.cross_entropy(x, target, label_smoothing=smoothing)
            assert isinstance(loss, Tensor)
            return loss

        def call(loss: Loss) -> Call:
            return lambda: torch.autograd.grad(
                loss(logits), logits
            )  # the gradient that arrives is 1, as in training

        contestants = {OURS: call(ours), "eager": call(eager)}
        if setting.compile:
            contestants["compile"] = call(torch.compile(eager, dynamic=False))
        return Contest(contestants, 2 * logits.nbytes)

    return build


def _linear(rows: int, features: int, classes: int) -> Callable[[Setting], Contest]:
    def build(setting: Setting) -> Contest:
        x = setting.random(rows, features, requires_grad=True)
        weight = setting.random(classes, features, requires_grad=True)
        target = torch.randint(classes, (rows,), device=setting.device)

        def eager() -> Tensor:
            return F.cross_entropy(F.linear(x, weight), target)

        def ours() -> Tensor:
            loss = ng.linear_cross_entropy(x, weight, target)
            assert isinstance(loss, Tensor)
            return loss

        def call(loss: Callable[[], Tensor]) -> Call:
            return lambda: torch.autograd.grad(loss(), (x, weight))

        contestants = {OURS: call(ours), "eager": call(eager)}
        if setting.compile:
            contestants["compile"] = call(torch.compile(eager, dynamic=False))
        return Contest(contestants)

    return build


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _peak(setting: Setting, call: Call) -> int:
    """Bytes a call needs beyond what there is before it; on the CPU by resident memory."""
    if setting.device.startswith("cuda"):
        call()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


CASES = [
    Case(
        "cross_entropy",
        f"{rows}x{classes} {str(dtype)[6:]}{' smoothed' if smoothing else ''}",
        _build(rows, classes, dtype, smoothing),
    )
    for rows, classes in ((64, 4096), (512, 32768), (128, 131072))
    for dtype in (torch.float32, torch.bfloat16)
    for smoothing in ((0.0, 0.1) if classes == 32768 and dtype == torch.float32 else (0.0,))
] + [Case("linear_cross_entropy", "1024x256x32768", _linear(1024, 256, 32768))]


def main() -> None:
    """Peak memory, in a process that keeps no freed pages: ``python -m bench.norm.bench_cross_entropy [JSON]``."""
    setting = Setting("cuda" if torch.cuda.is_available() else "cpu", compile=False)
    rows, features, classes = 1024, 64, 131072
    contest = _linear(rows, features, classes)(setting)
    case = f"linear_cross_entropy {rows}x{features}x{classes}"
    peaks = {name: _peak(setting, call) for name, call in contest.contestants.items()}
    for name, peak in peaks.items():
        print(f"{case}, {name}: {peak / 2**20:.0f} MiB")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"case": case, "bytes": peaks}, indent=2) + "\n")


if __name__ == "__main__":
    main()
