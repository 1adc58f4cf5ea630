"""Is this installation whole? One operator of each room against PyTorch, in kernels, not references.

Prints a line of JSON that tools/wheel_matrix.py puts into its table.
"""

from __future__ import annotations

import json
import platform

import torch

import narrowgauge as ng

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def check_norm(device: str) -> None:
    x, weight = torch.randn(8, 96, device=device), torch.randn(96, device=device)
    expected = torch.nn.functional.rms_norm(x, (96,), weight, 1e-6)
    torch.testing.assert_close(ng.nn.functional.rms_norm(x, (96,), weight, 1e-6), expected)


def check_quant(device: str) -> None:
    x = torch.randn(8, 96, device=device)
    error = (ng.quant.dequantize(ng.quant.quantize(x, ng.quant.Scheme("int8", "row"))) - x).abs()
    half_step = x.abs().amax(1, keepdim=True) / 127 / 2
    assert (error <= half_step * 1.0001).all()


def check_optim(device: str) -> None:
    start, gradient = torch.randn(1000, device=device), torch.randn(1000, device=device)
    results = []
    for kind in (ng.optim.AdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=1e-2)
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results)


def main() -> None:
    info = ng.info()
    with ng.backend("native"):
        for device in DEVICES:
            check_norm(device)
            check_quant(device)
            check_optim(device)
    row = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu library": f"loaded, {info.cpu_isa}",
        "cuda library": info.cuda_library,
    }
    if info.cuda_library.endswith(".so"):
        row["cuda library"] = "loaded, kernels ran" if "cuda" in DEVICES else "loaded, no device to run on"
    print(json.dumps(row))


if __name__ == "__main__":
    main()
