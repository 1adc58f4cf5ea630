"""Runs every operator's CUDA kernel once on each of its small samples, for compute-sanitizer to watch."""

from __future__ import annotations

import sys

import torch

import narrowgauge as ng
from narrowgauge.ops import registry

LARGEST = 1 << 16  # elements of a sample: the sanitizers slow kernels down a thousandfold


def main() -> int:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    calls = 0
    with ng.backend("native"), torch.no_grad():
        for operator in registry.values():
            for dtype in operator.dtypes:
                for sample in operator.sample_calls(dtype, "cuda"):
                    tensors = [
                        leaf for leaf in torch.utils._pytree.tree_leaves(sample.args) if torch.is_tensor(leaf)
                    ]
                    if sum(tensor.numel() for tensor in tensors) <= LARGEST:
                        operator(*sample.args)
                        calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls of {len(registry)} operators")
    return 0 if calls else 1


if __name__ == "__main__":
    sys.exit(main())
