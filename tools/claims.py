"""Writes docs/claims.md: what papers claim, beside what `narrowgauge bench` measured (`--check` compares only).

Numbers come from bench/results/cpu.json and bench/results/memory.json alone, so they cannot be mistyped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "claims.md"
RESULTS = ROOT / "bench" / "results"
OURS = "narrowgauge"


class Claim(NamedTuple):
    """A figure of a paper, and the cases that measure the same: how many times faster `fast` is than `slow`."""

    system: str  # link text
    page: str
    source: str
    claim: str
    slow: str
    fast: str
    cases: tuple[str, ...]


CLAIMS = (
    Claim(
        "Two-pass softmax",
        "norm/softmax.md",
        "arXiv 2001.04438",
        "faster than three passes on rows out of cache by up to 18 % (AVX2) and 28 % (AVX-512)",
        "narrowgauge three_pass",
        "narrowgauge two_pass",
        tuple(f"softmax {n} {t}" for n in ("8x4194304", "1x16777216") for t in ("float32", "bfloat16")),
    ),
    Claim(
        "L1 norm in integers",
        "norm/l1.md",
        "arXiv 2411.10948",
        "quantized L1 layers have 35.54 % more throughput on the CPU than L2 layers",
        "compiled L2",
        OURS,
        ("quant_l1_norm fwd 4096x4096 int8", "quant_l1_norm fwd 256x1024 int8"),
    ),
    Claim(
        "L1 norm in floating point",
        "norm/l1.md",
        "arXiv 2411.10948",
        "no figure for floating point; beside this package's LayerNorm",
        "L2, narrowgauge",
        OURS,
        tuple(f"l1_layer_norm fwd {n} float32" for n in ("4096x4096", "256x1024")),
    ),
    Claim(
        "Pre-LN to Pre-RMSNorm",
        "norm/pre_rmsnorm.md",
        "arXiv 2305.14858",
        "1 to 10 % less time, training and inference",
        "LayerNorm",
        OURS,
        tuple(
            f"convert_pre_ln_to_rms {what} {model} float32"
            for model in ("gpt-384x4", "vit-384x4")
            for what in ("infer", "train")
        ),
    ),
    Claim(
        "Unified Normalization, folded",
        "norm/unified.md",
        "arXiv 2208.01313",
        "about 31 % faster inference than LayerNorm on a GPU",
        "eager",
        OURS,
        ("unified_norm folded block against LayerNorm 512x512 float32",),
    ),
    Claim(
        "LayerNorm removal, folded",
        "norm/ln_removal.md",
        "arXiv 2507.02559",
        "no row reductions are left at inference; no figure for speed",
        "LayerNorm",
        OURS,
        ("fold_fixed_layernorm infer gpt-384x4 float32", "fold_fixed_layernorm infer vit-384x4 float32"),
    ),
    Claim(
        "DyT",
        "norm/dyt.md",
        "arXiv 2503.10622",
        "faster than an unfused RMSNorm (preliminary, by its authors); beside this package's LayerNorm",
        "our LayerNorm",
        OURS,
        ("dyt fwd 4096x4096 float32", "dyt fwd+bwd 4096x4096 float32"),
    ),
)

INTRODUCTION = """\
# Claims of papers, measured again

<!-- Written by tools/claims.py; do not edit. -->

The figures of papers beside those of this package on one CPU, ratios of one run of `narrowgauge bench`: 1.20x says that
the paper's method took 1 / 1.20 of the time of what it is compared with (the median of paired rounds). They were
measured on {machine}. Whether a figure of a GPU holds on a GPU is not measured here.

| system | the paper's claim | case | measured |
|---|---|---|---:|
"""


def ratio(case: dict[str, Any], slow: str, fast: str) -> float:
    """Time of `slow` over time of `fast`, both from their ratios to ours."""

    def to_ours(name: str) -> float:
        return 1.0 if name == OURS else case["speedups"][name]["median"]

    return to_ours(slow) / to_ours(fast)


def page() -> str:
    result = json.loads((RESULTS / "cpu.json").read_text())
    memory = json.loads((RESULTS / "memory.json").read_text())
    cases = {case["name"]: case for case in result["cases"]}
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_isa']} kernels, torch {machine['torch']}"
    text = INTRODUCTION.format(machine=where)
    for claim in CLAIMS:
        for i, name in enumerate(claim.cases):
            head = f"[{claim.system}]({claim.page}), {claim.source} | {claim.claim}" if i == 0 else " | "
            text += f"| {head} | {name} | {ratio(cases[name], claim.slow, claim.fast):.2f}x |\n"
    ours, eager = memory["bytes"][OURS], memory["bytes"]["eager"]
    text += (
        f"\nPeak memory of `{memory['case']}` (loss and gradients), beside the logits as PyTorch holds them: "
        f"{ours / 2**20:.0f} MiB against {eager / 2**20:.0f} MiB, {ours / eager:.0%} "
        "([fused linear and cross-entropy](norm/cross_entropy.md)).\n"
    )
    return text


def main(*arguments: str) -> int:
    text = page()
    if "--check" in arguments:
        if PAGE.is_file() and PAGE.read_text() == text:
            return 0
        print("docs/claims.md is out of date: run python tools/claims.py", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
