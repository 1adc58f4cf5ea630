"""ResidualNorm and peri_add_norm: recorded decoder layers, and the laws that hold between the schemes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.golden_files import files, read
from tests.tolerances import assert_near, assert_same_bits
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.nn import ResidualNorm, mix_ln_schemes
from narrowgauge.nn.functional import peri_add_norm
from narrowgauge.norm.placement import SCHEMES

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)

# Norm names of the recorded layers: before and after attention, before and after the MLP.
NAMES: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "lns": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "deep": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "peri": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
             "post_feedforward_layernorm"),
}  # fmt: skip


def options(scheme: str, layer: int = 1) -> dict[str, Any]:
    """What a ResidualNorm of a scheme needs besides its width."""
    return {
        "scheme": scheme,
        "layer_index": layer,
        "residual_scale": 64**0.25 if scheme == "deep" else None,
    }


def recorded_scheme(meta: dict[str, Any], layer: int, weights: dict[str, Tensor]) -> str:
    """The scheme of a recorded layer; in a mixture its weights tell which it is."""
    name = meta["norm_type"].lower()
    if name == "lns":
        return "lns"
    if name == "sandwich":
        return "peri"
    if name == "deeppost":
        return "deep"
    return "pre" if f"layer{layer}.input_layernorm.weight" in weights else "post"


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of (batch, heads, tokens, width)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), frequencies).repeat(1, 2)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + turned * angles.sin()


def attention(x: Tensor, weight: dict[str, Tensor], heads: int) -> Tensor:
    def project(name: str) -> Tensor:
        return F.linear(x, weight[f"self_attn.{name}_proj.weight"]).unflatten(-1, (heads, -1)).transpose(1, 2)

    y = F.scaled_dot_product_attention(
        rotated(project("q")), rotated(project("k")), project("v"), is_causal=True
    )
    return F.linear(y.transpose(1, 2).flatten(-2), weight["self_attn.o_proj.weight"])


def mlp(x: Tensor, weight: dict[str, Tensor]) -> Tensor:
    gate, up, down = (weight[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@pytest.mark.parametrize("fused", [False, True], ids=["wrapped", "junctions"])
@each_backend
@pytest.mark.parametrize("path", files("placement"), ids=lambda path: path.stem)
def test_recorded_decoder_layers(path: Path, backend: Any, fused: bool) -> None:
    case, meta = read(path)
    weights = {name.removeprefix("param_"): value for name, value in case.items() if name[:6] == "param_"}
    d, heads, layers = meta["hidden"], meta["heads"], meta["layers"]
    x = case["in_x"].clone().requires_grad_()

    blocks: list[ResidualNorm] = []
    norms: dict[str, nn.Module] = {}
    for i in range(layers):
        scheme = recorded_scheme(meta, i, weights)
        scale = 2.828 if scheme == "deep" else None  # the recorded code rounds 8 ** 0.5
        names = iter(NAMES[scheme])
        for _ in range(2):
            block = ResidualNorm(
                d, scheme, "rms", i + 1, meta["eps"], residual_scale=scale, dtype=torch.float64
            )
            for norm, name in ((block.norm_in, next(names)), (block.norm_out, next(names))):
                assert (norm is None) == (name is None)
                if norm is not None:
                    norms[f"layer{i}.{name}"] = norm
                    norm.load_state_dict({"weight": weights[f"layer{i}.{name}.weight"]})
            blocks.append(block)

    def sublayer(index: int, y: Tensor) -> Tensor:
        prefix = f"layer{index // 2}."
        weight = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        return attention(y, weight, heads) if index % 2 == 0 else mlp(y, weight)

    with ng.backend(backend):
        stream, streams = x, []
        if fused:
            y = blocks[0].normed_input(x)
            for i, block in enumerate(blocks[:-1]):
                stream, y = block.junction(stream, sublayer(i, y), blocks[i + 1])
                streams.append(stream)
            streams.append(blocks[-1].forward(stream, lambda _: sublayer(len(blocks) - 1, y)))
        else:
            for i, block in enumerate(blocks):
                stream = block(stream, lambda y, i=i: sublayer(i, y))
                streams.append(stream)
        streams[-1].backward(case["in_grad_y"])

    def close(actual: Tensor, recorded: Tensor) -> None:
        torch.testing.assert_close(actual, recorded, rtol=1e-5, atol=1e-5)

    for i in range(layers):
        close(streams[2 * i + 1], case[f"out_layer{i}"])
    close(x.grad, case["grad_x"])
    compared = 0
    for name, norm in norms.items():
        close(norm.weight.grad, case[f"grad_{name}.weight"])
        compared += 1
    assert compared == sum(name.startswith("grad_layer") for name in case)


# --- laws ---------------------------------------------------------------------------------------------------


def sublayer_of(d: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d)).double()


def block_of(scheme: str, d: int = 24, norm: str = "rms", layer: int = 1) -> ResidualNorm:
    block = ResidualNorm(d, norm=norm, dtype=torch.float64, **options(scheme, layer))
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.rand(d, generator=generator, dtype=torch.float64) + 0.5)
    return block


@each_backend
@pytest.mark.parametrize("norm", ["rms", "layer"])
@each_scheme
def test_schemes_are_what_their_formulas_say(scheme: str, norm: str, backend: Any) -> None:
    block, f = block_of(scheme, norm=norm, layer=3), sublayer_of(24)
    x = torch.randn(4, 24, dtype=torch.float64)

    def plain(module: nn.Module, v: Tensor) -> Tensor:
        if norm == "rms":
            return F.rms_norm(v, (24,), module.weight, 1e-6)
        return F.layer_norm(v, (24,), module.weight, module.bias, 1e-6)

    expected = {
        "pre": lambda: x + f(plain(block.norm_in, x)),
        "post": lambda: plain(block.norm_out, x + f(x)),
        "peri": lambda: x + plain(block.norm_out, f(plain(block.norm_in, x))),
        "lns": lambda: x + f(plain(block.norm_in, x) / math.sqrt(3)),
        "deep": lambda: plain(block.norm_out, 64**0.25 * x + f(x)),
    }[scheme]()
    with ng.backend(backend):
        assert_near(block(x, f), expected)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("next_scheme", SCHEMES)
def test_a_junction_is_the_new_stream_and_the_next_input(scheme: str, next_scheme: str, norm: str) -> None:
    block, following = block_of(scheme, norm=norm, layer=2), block_of(next_scheme, norm=norm, layer=3)
    x, f = torch.randn(2, 4, 24, dtype=torch.float64).unbind()
    stream, y = block.junction(x, f, following)
    assert_near(stream, block(x, lambda _: f).double())
    assert_near(y, following.normed_input(stream).double())


def test_lns_with_index_one_is_pre_ln() -> None:
    lns, pre, f = block_of("lns", layer=1), block_of("pre"), sublayer_of(24)
    pre.load_state_dict(lns.state_dict())
    x = torch.randn(4, 24, dtype=torch.float64)
    assert_same_bits(lns(x, f), pre(x, f))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_lns_is_pre_ln_with_weights_divided_by_the_root_of_the_index(norm: str) -> None:
    lns, pre, f = block_of("lns", norm=norm, layer=7), block_of("pre", norm=norm), sublayer_of(24)
    pre.load_state_dict({name: value / math.sqrt(7) for name, value in lns.state_dict().items()})
    x = torch.randn(4, 24, dtype=torch.float64)
    assert_near(lns(x, f), pre(x, f))


def test_mix_ln_at_its_ends_and_at_its_default() -> None:
    assert mix_ln_schemes(5, 0) == ["pre"] * 5
    assert mix_ln_schemes(5, 1.0) == ["post"] * 5
    assert mix_ln_schemes(12) == ["post"] * 3 + ["pre"] * 9
    assert mix_ln_schemes(24) == ["post"] * 6 + ["pre"] * 18
    assert mix_ln_schemes(7) == ["post"] + ["pre"] * 6
    assert mix_ln_schemes(0) == []


def test_peri_without_an_effect_of_its_norms_is_the_plain_residual() -> None:
    """On rows of root mean square one a norm with weight one changes nothing but for eps."""
    block = ResidualNorm(16, "peri", eps=0.0, dtype=torch.float64)
    x = F.normalize(torch.randn(5, 16, dtype=torch.float64), dim=-1) * 4
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    assert_near(block(x, lambda y: y @ rotation), x + x @ rotation)


@torch.no_grad()
def variances(scheme: str, depth: int, gain: float) -> Tensor:
    """Mean square of the stream after each layer at initialization, with linear sub-layers of this gain."""
    d = 128
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, d, generator=generator, dtype=torch.float64)
    trace = []
    for layer in range(1, depth + 1):
        weight = torch.randn(d, d, generator=generator, dtype=torch.float64) * gain / math.sqrt(d)
        second = torch.randn(d, d, generator=generator, dtype=torch.float64) * gain / math.sqrt(d)
        block = ResidualNorm(d, scheme, layer_index=layer, dtype=torch.float64)
        x = block(x, lambda y, w=weight, v=second: (y @ w) @ v + (y @ w) * (y @ v))
        trace.append(x.square().mean())
    return torch.stack(trace)


def test_variance_over_depth() -> None:
    depth, gain = 24, 3.0
    peri, pre, lns = (variances(scheme, depth, gain) for scheme in ("peri", "pre", "lns"))
    steps = peri.diff()
    assert steps.min() > 0.7
    assert steps.max() < 1.3  # one layer adds one, whatever its weights: linear in depth
    assert pre[-1] > 50 * peri[-1]  # a layer adds what its weights make of the normed stream
    assert lns[-1] < 0.3 * pre[-1]
    assert lns.diff()[-6:].mean() < 0.3 * lns.diff()[:3].mean()  # deeper layers add less


# --- peri_add_norm ------------------------------------------------------------------------------------------


def composed(f: Tensor, x: Tensor, w_out: Tensor, w_in: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_new = x + F.rms_norm(f, f.shape[-1:], w_out, eps)
    return F.rms_norm(x_new, x_new.shape[-1:], w_in, eps), x_new


@each_backend
@pytest.mark.parametrize("shape", [(3, 17), (2, 3, 64), (1, 129), (2, 1, 4097)], ids=str)
def test_peri_add_norm_is_the_composition(shape: tuple[int, ...], backend: Any) -> None:
    tensors = [torch.randn(*size, dtype=torch.float64) for size in (shape, shape, shape[-1:], shape[-1:])]
    ours, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    outer = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    with ng.backend(backend):
        results = peri_add_norm(*ours, 1e-5)
        torch.autograd.backward(results, outer)
    expected = composed(*theirs, 1e-5)
    torch.autograd.backward(expected, outer)
    for a, e in zip([*results, *(t.grad for t in ours)], [*expected, *(t.grad for t in theirs)], strict=True):
        assert_near(a.detach(), e.detach())


@each_backend
def test_peri_add_norm_with_zero_centred_weights_and_a_wide_stream(backend: Any) -> None:
    f, x = torch.randn(4, 40).bfloat16(), torch.randn(4, 40)
    w_out, w_in = torch.randn(2, 40).unbind()
    with ng.backend(backend):
        y, x_new = peri_add_norm(f, x, w_out, w_in, weight_offset=1.0)
    assert (y.dtype, x_new.dtype) == (torch.bfloat16, torch.float32)
    truth = composed(f.double(), x.double(), w_out.double() + 1, w_in.double() + 1, 1e-6)
    assert_near(y, truth[0])
    assert_near(x_new, truth[1])


def test_peri_add_norm_of_strided_tensors_and_special_values() -> None:
    f, x = torch.randn(2, 8, 6).unbind()
    plain = peri_add_norm(f.t().contiguous(), x.t().contiguous())
    for a, e in zip(peri_add_norm(f.t(), x.t()), plain, strict=True):
        assert_same_bits(a, e)
    f[0, 0], x[1, 0] = math.nan, math.inf
    y, x_new = peri_add_norm(f, x)
    assert x_new[0].isnan().all()
    assert y[0].isnan().all()
    assert x_new[1, 0] == math.inf
    assert y[1, 0].isnan()
    assert y[2:].isfinite().all()
    y, x_new = peri_add_norm(torch.zeros(2, 5), torch.zeros(2, 5))
    assert y.count_nonzero() == x_new.count_nonzero() == 0


def test_compiled_whole_and_round_trip() -> None:
    for scheme in SCHEMES:
        block, f = block_of(scheme), sublayer_of(24)
        x = torch.randn(4, 24, dtype=torch.float64, requires_grad=True)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert_near(compiled(x, f).detach(), block(x, f).detach())
        other = ResidualNorm(24, dtype=torch.float64, **options(scheme))
        other.load_state_dict(block.state_dict())
        assert_same_bits(other(x, f).detach(), block(x, f).detach())
    torch._dynamo.reset()


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResidualNorm(8, "sandwich"), "scheme must be one of .*'peri'.*; got 'sandwich'"),
        (lambda: ResidualNorm(8, norm="batch"), "norm must be one of 'rms', 'layer'; got 'batch'"),
        (lambda: ResidualNorm(8, "lns"), "'lns' needs layer_index"),
        (lambda: ResidualNorm(8, "lns", layer_index=0), "layer_index counts from 1, got 0"),
        (lambda: ResidualNorm(8, "deep"), "residual_scale is needed by scheme 'deep'"),
        (lambda: ResidualNorm(8, "pre", residual_scale=2.0), "used by no other; got 2.0 with scheme 'pre'"),
        (lambda: ResidualNorm(8, eps=-1.0), "eps must be a finite number"),
        (lambda: mix_ln_schemes(4, 1.5), "alpha must be between 0 and 1, got 1.5"),
        (lambda: mix_ln_schemes(-1), "num_layers must be an integer >= 0, got -1"),
        (
            lambda: peri_add_norm(torch.ones(2, 3), torch.ones(3, 2)),
            r"x has shape \(3, 2\); expected that of f",
        ),
        (
            lambda: peri_add_norm(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)),
            r"w_out has shape \(2,\)",
        ),
        (
            lambda: peri_add_norm(torch.ones(2, 3), torch.ones(2, 3), eps=math.inf),
            "eps must be a finite number",
        ),
        (lambda: peri_add_norm(torch.tensor(1.0), torch.ones(1)), "f must have at least one dimension"),
    ],
)
def test_wrong_values_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3), None), "x must be a tensor, got NoneType"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)), "f has dtype torch.int64"),
        (
            (torch.ones(2, 3), torch.ones(2, 3).double()),
            "x has dtype torch.float64 beside f of torch.float32",
        ),
        (
            (torch.ones(2, 3), torch.ones(2, 3), None, torch.ones(3).half()),
            "w_in has dtype torch.float16",
        ),
    ],
)
def test_wrong_types_are_named(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        peri_add_norm(*args)
