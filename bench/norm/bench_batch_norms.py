"""PowerNorm and UnifiedNorm behind their warm-up, against the same steps written in PyTorch and against LayerNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Case, Contest, Setting, compare
from narrowgauge.nn import LayerNorm, PowerNorm, UnifiedNorm
from narrowgauge.nn.functional import fold_unified_norm

SHAPES = ((4096, 4096), (256, 1024))
DTYPES = (torch.float32, torch.bfloat16)
GROUPS, WARMUP = 16, 10
Norm = PowerNorm | UnifiedNorm


def scaled_by_groups(x: Tensor) -> Tensor:
    pieces = x.unflatten(-1, (GROUPS, -1))
    return (pieces * (pieces.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2)


class PowerSteps(torch.autograd.Function):
    """Behind the group scaling."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, norm: PowerNorm) -> Tensor:
        q = u.square().mean(0)
        z = u * (norm.running_phi + norm.eps).rsqrt()
        norm.running_phi.copy_(norm.alpha_fwd * norm.running_phi + (1 - norm.alpha_fwd) * q)
        norm.num_batches_tracked.add_(1)
        ctx.save_for_backward(z, weight, q)
        ctx.norm = norm
        return weight * z + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, q = ctx.saved_tensors
        norm = ctx.norm
        a = dy * weight - (1 - norm.alpha_bkw) * norm.ema_gz * z
        norm.ema_gz.add_((a * z).mean(0))
        return a * (q + norm.eps).rsqrt(), (dy * z).sum(0), dy.sum(0), None


def eager_power_norm(norm: PowerNorm) -> Callable[..., Tensor]:
    def train(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return PowerSteps.apply(scaled_by_groups(x.float()), weight, bias, norm).to(x.dtype)

    def evaluate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        u = scaled_by_groups(x.float())
        return (weight * (u * (norm.running_phi + norm.eps).rsqrt()) + bias).to(x.dtype)

    return train if norm.training else evaluate


class UnifiedSteps(torch.autograd.Function):
    """After the warm-up, without a search for outliers, and with its ratio at one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: UnifiedNorm) -> Tensor:
        norm.num_batches_tracked.add_(1)
        slots = torch.arange(norm.window_size[0], device=x.device).unsqueeze(-1)
        slot = slots == norm.num_batches_tracked % norm.window_size[0]
        norm.buffer_x2.copy_(torch.where(slot, x.square().mean(0), norm.buffer_x2))
        v = norm.buffer_x2.log().mean(0).exp()
        inverse = (v + norm.eps).rsqrt()
        norm.running_var.copy_(norm.momentum * norm.running_var + (1 - norm.momentum) * v)
        z = x * inverse
        ctx.save_for_backward(z, weight, inverse, slot)
        ctx.norm = norm
        return weight * z + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, inverse, slot = ctx.saved_tensors
        norm = ctx.norm
        g = dy * weight
        norm.buffer_gz.copy_(torch.where(slot, (g * z).mean(0), norm.buffer_gz))
        norm.ema_gz.copy_(norm.momentum * norm.ema_gz + (1 - norm.momentum) * norm.buffer_gz.mean(0))
        return (g - norm.ema_gz * z) * inverse, (dy * z).sum(0), dy.sum(0), None


def eager_unified_norm(norm: UnifiedNorm) -> Callable[..., Tensor]:
    def train(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return UnifiedSteps.apply(x.float(), weight, bias, norm).to(x.dtype)

    def evaluate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (weight * (x.float() * (norm.running_var + norm.eps).rsqrt()) + bias).to(x.dtype)

    return train if norm.training else evaluate


def power_norm(channels: int, device: str) -> PowerNorm:
    return PowerNorm(channels, warmup_iters=WARMUP, num_groups=GROUPS, device=device)


def unified_norm(channels: int, device: str) -> UnifiedNorm:
    norm = UnifiedNorm(channels, warmup_iters=WARMUP, device=device)
    norm.buffer_x2.fill_(1.0)
    return norm


# Per system: how it is made, its eager form, and passes over x: forward, backward and evaluation.
SYSTEMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int, int, int]] = {
    "power_norm": (power_norm, eager_power_norm, 2, 3, 2),
    "unified_norm": (unified_norm, eager_unified_norm, 3, 5, 2),
}


def case(system: str, shape: tuple[int, int], dtype: torch.dtype, phase: str) -> Case:
    def build(setting: Setting) -> Contest:
        make, eager_form, forward, backward, evaluation = SYSTEMS[system]
        norm = make(shape[1], setting.device)
        norm.num_batches_tracked.fill_(WARMUP + 1)
        norm.train(phase != "eval")
        x = setting.random(*shape, dtype=dtype, requires_grad=phase == "fwd+bwd")
        for parameter in norm.parameters():
            parameter.requires_grad_(phase == "fwd+bwd")
        passes = {"fwd": forward, "fwd+bwd": forward + backward, "eval": evaluation}[phase]

        def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype))

        return compare(
            setting,
            lambda x, weight, bias: norm(x),
            eager_form(copy.deepcopy(norm)),
            [x, norm.weight, norm.bias],
            backward=phase == "fwd+bwd",
            bytes_moved=passes * x.nbytes,
            rivals={"LayerNorm": layer_norm},
        )

    return Case(system, f"{phase} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}", build)


class Block(nn.Module):
    """The token-wise part of a transformer block: what reads a norm, and what leads back to the stream."""

    def __init__(self, width: int, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm(), norm()])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.qkv(self.norms[0](x))[..., : x.shape[-1]])
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def folded(block: Block) -> Block:
    block = copy.deepcopy(block)
    block.qkv = fold_unified_norm(block.norms[0], block.qkv)
    block.up = fold_unified_norm(block.norms[1], block.up)
    block.norms = nn.ModuleList([nn.Identity(), nn.Identity()])
    return block


def block_case(tokens: int, width: int) -> Case:
    def build(setting: Setting) -> Contest:
        def block(norm: Callable[[], nn.Module]) -> Block:
            torch.manual_seed(0)
            return Block(width, norm).to(setting.device).eval().requires_grad_(False)

        unified = block(lambda: UnifiedNorm(width))
        return compare(
            setting,
            folded(unified),
            block(lambda: nn.LayerNorm(width)),
            [setting.random(tokens, width)],
            rivals={"not folded": unified, "fused LayerNorm": block(lambda: LayerNorm(width))},
        )

    return Case("unified_norm", f"folded block against LayerNorm {tokens}x{width} float32", build)


CASES = [
    *(
        case(system, shape, dtype, phase)
        for system in SYSTEMS
        for shape in SHAPES
        for dtype in DTYPES
        for phase in ("fwd", "fwd+bwd", "eval")
    ),
    block_case(512, 512),
]
