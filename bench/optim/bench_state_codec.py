"""Encoding and decoding the state of 16 million parameters, beside the best plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness import OURS, Case, Contest, Setting
from narrowgauge.optim import codec

SHAPE = (4096, 4096)


def eager_expanded(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`"fp8_expanded"` with float32 powers; the definition takes float64 ones."""
    magnitude = blocks.abs()
    largest = magnitude.amax(1, keepdim=True) + 1e-30
    smallest = torch.where(magnitude == 0, torch.inf, magnitude).amin(1, keepdim=True) + 1e-30
    center = largest.sqrt() * smallest.sqrt()
    exponent = (265.8353 / (largest / smallest).log2()).floor().clamp(1, 256) / 16
    scale = (largest / center).pow(exponent) / 448
    y = (magnitude / center).pow(exponent).copysign(blocks) / scale
    return y.clamp(-448, 448).to(torch.float8_e4m3fn), torch.cat((scale, exponent, center), 1)


def encode_case(state_dtype: str) -> Case:
    def build(setting: Setting) -> Contest:
        x = setting.random(*SHAPE)
        call = (x, codec.FORMATS[state_dtype].number, True)

        def eager() -> tuple[Tensor, Tensor]:
            if state_dtype == "fp8_expanded":
                return eager_expanded(x.view(-1, 128))
            return codec.encode(x.view(-1), state_dtype, True)

        contest = Contest(
            {OURS: lambda: codec.state_encode(*call), "eager": eager}, codec.state_encode.bytes_moved(*call)
        )
        if setting.compile:
            contest.contestants["compile"] = torch.compile(eager, dynamic=False)
        return contest

    return Case("state_encode", f"16M float32 to {state_dtype}", build)


def decode_case(state_dtype: str) -> Case:
    def build(setting: Setting) -> Contest:
        x = setting.random(*SHAPE)
        number = codec.FORMATS[state_dtype].number
        codes, scale = codec.state_encode(x.view(-1), number, True)
        call = (codes, scale, number, True, [x.numel()])

        def eager() -> Tensor:
            if state_dtype == "fp8_expanded":
                scales, exponent, center = scale.unsqueeze(1).unbind(2)
                y = codes.view(torch.float8_e4m3fn).view(-1, 128).float() * scales
                return (y.abs().pow(1 / exponent) * center).copysign(y)
            return codec.decode(codes, scale, state_dtype, True, x.numel())

        contest = Contest(
            {OURS: lambda: codec.state_decode(*call), "eager": eager}, codec.state_decode.bytes_moved(*call)
        )
        if setting.compile:
            contest.contestants["compile"] = torch.compile(eager, dynamic=False)
        return contest

    return Case("state_decode", f"16M {state_dtype} to float32", build)


CODED = [name for name, record in codec.FORMATS.items() if record.block_size]
CASES = [make(name) for make in (encode_case, decode_case) for name in CODED]


def test_state_codec(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
