"""Whole models before and after an exact conversion, and the row operators behind the conversions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrowgauge as ng
from bench.harness import OURS, Call, Case, Contest, Setting, compare
from narrowgauge.convert import convert_pre_ln_to_rms, fold_fixed_layernorm
from narrowgauge.nn import FixedStdLayerNorm
from narrowgauge.nn import functional as ngf
from narrowgauge.ops import registry

SHAPES = ((4096, 4096), (256, 1024))
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


# --- models with the names of GPT-2 and of timm's ViT ---


def children(**modules: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, child in modules.items():
        setattr(parent, name, child)
    return parent


def attend(qkv: Tensor, heads: int, causal: bool) -> Tensor:
    b, t, width = qkv.shape
    q, k, v = (part.view(b, t, heads, -1).transpose(1, 2) for part in qkv.split(width // 3, -1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(b, t, width // 3)


class Block(nn.Module):
    """A GPT-2 block (with linear layers)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.heads = d // 64
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = children(c_attn=nn.Linear(d, 3 * d), c_proj=nn.Linear(d, d))
        self.mlp = children(c_fc=nn.Linear(d, 4 * d), c_proj=nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn.c_proj(attend(self.attn.c_attn(self.ln_1(x)), self.heads, causal=True))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, d: int, depth: int, vocabulary: int = 512, context: int = 256) -> None:
        super().__init__()
        self.transformer = children(
            wte=nn.Embedding(vocabulary, d), wpe=nn.Embedding(context, d), ln_f=nn.LayerNorm(d)
        )
        self.transformer.h = nn.ModuleList(Block(d) for _ in range(depth))
        self.lm_head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        trunk = self.transformer
        x = trunk.wte(tokens) + trunk.wpe(torch.arange(tokens.shape[-1], device=tokens.device))
        for block in trunk.h:
            x = block(x)
        return self.lm_head(trunk.ln_f(x))


class ViTBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.heads = d // 64
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = children(qkv=nn.Linear(d, 3 * d), proj=nn.Linear(d, d))
        self.mlp = children(fc1=nn.Linear(d, 4 * d), fc2=nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn.proj(attend(self.attn.qkv(self.norm1(x)), self.heads, causal=False))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, d: int, depth: int) -> None:
        super().__init__()
        self.patch_embed = children(proj=nn.Conv2d(3, d, 16, 16))
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.randn(1, 1, d)),
            nn.Parameter(torch.randn(1, 197, d)),
        )
        self.blocks = nn.Sequential(*(ViTBlock(d) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Setting], Tensor]]] = {
    "gpt-384x4": (lambda: GPT(384, 4), lambda s: torch.randint(512, (2, 256), device=s.device)),
    "vit-384x4": (lambda: ViT(384, 4), lambda s: s.random(2, 3, 224, 224)),
}


def step(model: nn.Module, data: Tensor, backward: bool) -> Call:
    parameters = list(model.parameters())

    def train() -> object:
        return torch.autograd.grad(model(data).float().square().mean(), parameters)

    def infer() -> object:
        with torch.no_grad():
            return model(data)

    return train if backward else infer


def model_case(
    operator: str, name: str, backward: bool, forms: Callable[[nn.Module, Tensor], dict[str, nn.Module]]
) -> Case:
    """Forms of one model, ours first, beside the LayerNorm model with the norms of this package and of torch."""

    def build(setting: Setting) -> Contest:
        make, data = MODELS[name]
        model, x = make().to(setting.device), data(setting)
        contestants = {**forms(model, x), "LayerNorm": ng.swap(model, inplace=False).model, "eager": model}
        if setting.compile:
            contestants["compile"] = copy.deepcopy(model)
            contestants["compile"].compile(dynamic=False)
        return Contest({form: step(each, x, backward) for form, each in contestants.items()})

    return Case(operator, f"{'train' if backward else 'infer'} {name} float32", build)


def converted(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    return {OURS: convert_pre_ln_to_rms(model)}


def folded(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """No norm left, and the model with fixed standard deviations that it comes from."""
    fixed = ng.swap(model, norm="fixed_std", inplace=False).model
    with torch.no_grad():
        fixed(x)
    for module in fixed.modules():
        if isinstance(module, FixedStdLayerNorm):
            module.freeze()
    return {OURS: fold_fixed_layernorm(fixed), "fixed": fixed}


# --- the row operators ---


def eager_crms_norm(x: Tensor) -> Tensor:
    total = x.sum(-1, keepdim=True)
    return x * ((x.square().sum(-1, keepdim=True) + total.square()) / (x.shape[-1] + 1) + EPS).rsqrt()


def crms_case(shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    def build(setting: Setting) -> Contest:
        x = setting.random(*shape, dtype=dtype, requires_grad=backward)
        with torch.no_grad():
            y, rstd = registry["crms_norm_forward"](x, EPS)
            moved = registry["crms_norm"].bytes_moved(x, EPS)
            if backward:
                moved += registry["crms_norm_backward"].bytes_moved(y, x, rstd)
        return compare(
            setting,
            lambda x: ngf.crms_norm(x, EPS),
            eager_crms_norm,
            [x],
            backward=backward,
            bytes_moved=moved,
        )

    return Case("crms_norm", described(shape, dtype, backward), build)


def fixed_case(shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> Case:
    """The frozen layer, which still tracks the standard deviation, as the removal recipe has it."""

    def build(setting: Setting) -> Contest:
        x = setting.random(*shape, dtype=dtype, requires_grad=backward)
        norm = FixedStdLayerNorm(shape[1], init_std=1.0, device=setting.device, dtype=dtype)
        norm.freeze()
        weight, bias = norm.weight.detach(), norm.bias.detach()  # type: ignore[union-attr]
        running = torch.ones((), device=setting.device)

        def eager(x: Tensor) -> Tensor:
            centred = x.float() - x.float().mean(-1, keepdim=True)
            with torch.no_grad():
                deviation = (centred.square().mean(-1) + EPS).sqrt().mean()
                running.copy_(0.9 * running + 0.1 * deviation)
            return (centred / 1.0 * weight + bias).to(x.dtype)

        moved = (4 if backward else 2) * x.nbytes + (x.nbytes if backward else 0)
        return compare(setting, norm, eager, [x], backward=backward, bytes_moved=moved)

    return Case("fixed_std_layer_norm", described(shape, dtype, backward), build)


def loss_case(shape: tuple[int, int], dtype: torch.dtype) -> Case:
    def build(setting: Setting) -> Contest:
        x = setting.random(*shape, dtype=dtype, requires_grad=True)
        mask = torch.arange(shape[0], device=setting.device) > 0

        def eager(x: Tensor) -> Tensor:
            deviation = (x.float().var(-1, unbiased=False) + EPS).sqrt()
            target = (torch.where(mask, deviation, 0).sum() / mask.sum()).detach()
            return 0.1 * (deviation - target).square().mean()

        return compare(
            setting,
            lambda x: ngf.residual_std_loss(x, mask),
            eager,
            [x],
            backward=True,
            bytes_moved=3 * x.nbytes,
        )

    return Case("residual_std_loss", described(shape, dtype, True), build)


def described(shape: tuple[int, int], dtype: torch.dtype, backward: bool) -> str:
    return f"{'fwd+bwd' if backward else 'fwd'} {shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"


ROWS: tuple[Any, ...] = (crms_case, fixed_case)
CASES = [
    *(model_case("convert_pre_ln_to_rms", name, b, converted) for name in MODELS for b in (False, True)),
    *(model_case("fold_fixed_layernorm", name, False, folded) for name in MODELS),
    *(make(s, t, b) for make in ROWS for b in (False, True) for s in SHAPES for t in DTYPES),
    *(loss_case(s, t) for s in SHAPES for t in DTYPES),
]


def test_convert(case: Case, contest: Callable[[Case], None]) -> None:
    contest(case)
