"""Continuing runs of torch.optim, bitsandbytes and torchao; the latter two are stand-ins, as neither is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.optim.every import EVERY, assert_near, assert_same_state, copies_of, flat_state
from tests.optim.test_adamw import parameters, train
from tests.optim.test_convert_states import bitsandbytes_state
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.optim import codec, encode_state
from narrowgauge.optim.from_torch import supported

SHAPES = [(33, 9), (12, 6), (90, 60)]
OF_TORCH = [name for name in EVERY if hasattr(torch.optim, name)]
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
}


def both(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any, Any, Any]:
    """A torch optimizer after three steps and ours from it, with parameters of their own."""
    theirs = parameters(*SHAPES, dtype=dtype)
    source = getattr(torch.optim, name)(
        [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.03}], lr=0.02, **OPTIONS.get(name, {})
    )
    train(theirs, source, 3)
    ours = ng.optim.from_torch(source, **options)
    mine = copies_of(theirs)
    for group in ours.param_groups:  # the tests go on with both
        group["params"] = [mine[next(i for i, q in enumerate(theirs) if q is p)] for p in group["params"]]
    for p, q in zip(theirs, mine, strict=True):
        ours.state[q] = ours.state.pop(p)
    ours.__setstate__({"state": ours.state, "param_groups": ours.param_groups})
    return theirs, source, mine, ours


@pytest.mark.parametrize("name", OF_TORCH)
def test_continues_as_torch_would(name: str) -> None:
    theirs, source, mine, ours = both(name)
    assert type(ours) is getattr(ng.optim, name)
    for group, expected in zip(ours.param_groups, source.param_groups, strict=True):
        assert {key: group[key] for key in expected if key != "params"} == {
            key: value for key, value in expected.items() if key != "params"
        }
    train(theirs, source, 3, first=3)
    train(mine, ours, 3, first=3)
    tolerance = 0.05 if name == "Muon" else 1e-9  # Muon iterates in bfloat16
    assert_near(mine, theirs, tolerance)


def test_states_are_stored_anew() -> None:
    theirs, source, mine, ours = both("AdamW", torch.float32, state_dtype="int8", ema_decay=0.9)
    assert set(ours.state[mine[0]]) == {"step", "exp_avg", "exp_avg_sq", "ema"}
    assert ours.state[mine[2]]["exp_avg.codes"].dtype is torch.uint8
    assert torch.equal(ours.state[mine[2]]["ema"], mine[2])
    start = copies_of(theirs)
    train(theirs, source, 3, first=3)
    train(mine, ours, 3, first=3)
    for p, q, before in zip(mine, theirs, start, strict=True):
        assert (p - q).norm() < 0.03 * (q - before).norm()


def test_codes_follow_the_memory_of_the_parameter() -> None:
    weight = nn.Parameter(torch.randn(8, 16, 5, 7).to(memory_format=torch.channels_last))
    plain = nn.Parameter(weight.detach().permute(0, 2, 3, 1))
    sources = [torch.optim.AdamW([p]) for p in (weight, plain)]
    grad = torch.randn(8, 5, 7, 16)
    ours = []
    for p, g, source in (
        (weight, grad.permute(0, 3, 1, 2).contiguous(), sources[0]),
        (plain, grad, sources[1]),
    ):
        p.grad = g
        source.step()
        ours.append(ng.optim.from_torch(source, state_dtype="int8", min_quantized_size=0))
        ours[-1].step()
    assert torch.equal(weight.permute(0, 2, 3, 1), plain)
    assert torch.equal(ours[0].state[weight]["exp_avg.scale"], ours[1].state[plain]["exp_avg.scale"])


def test_schedulers_go_on() -> None:
    (p,) = parameters((5, 3))
    source = torch.optim.AdamW([p], lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(source, 0.5)
    train([p], source, 1)
    scheduler.step()
    ours = ng.optim.from_torch(source)
    assert ours.param_groups[0]["lr"] == 0.2
    assert ours.param_groups[0]["initial_lr"] == 0.4
    scheduler.optimizer = ours
    train([p], ours, 1)
    scheduler.step()
    assert ours.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_tensor_lr_and_named_parameters() -> None:
    model = nn.Linear(3, 2)
    rate = torch.tensor(0.25)
    source = torch.optim.Adam(model.named_parameters(), lr=rate)
    ours = ng.optim.from_torch(source)
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    assert ours.param_groups[0]["lr"].item() == 0.25
    assert not ours.state
    ours.add_param_group({"params": [("other", nn.Parameter(torch.zeros(3)))]})
    assert ours.param_groups[1]["lr"].item() == 0.25


def test_the_source_is_left_as_it_is() -> None:
    params = parameters(*SHAPES)
    source = torch.optim.AdamW(params)
    train(params, source, 2)
    before = flat_state(source)
    train(params, ng.optim.from_torch(source), 2)
    assert_same_state(source, before)


class Foreign(torch.optim.Optimizer):
    """What the optimizers of other libraries have in common."""

    def __init__(self, params: list[nn.Parameter], **options: Any) -> None:
        super().__init__(
            params, {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1, **options}
        )


def of(library: str, name: str, params: list[nn.Parameter], **options: Any) -> Any:
    return type(name, (Foreign,), {"__module__": f"{library}.optim.adamw"})(params, **options)


def test_bitsandbytes() -> None:
    p, small = nn.Parameter(torch.randn(9, 57)), nn.Parameter(torch.randn(7))
    source = of("bitsandbytes", "PagedAdamW8bit", [p, small], alpha=0.0, t_alpha=None)
    source.state[p] = bitsandbytes_state()
    source.state[small] = {"step": 2, "state1": torch.randn(7), "state2": torch.rand(7)}
    source.args = SimpleNamespace(percentile_clipping=100, max_unorm=0.0)
    ours = ng.optim.from_torch(source, min_quantized_size=256)
    assert type(ours) is ng.optim.AdamW
    assert ours.param_groups[0]["betas"] == (0.9, 0.99)
    assert "alpha" not in ours.param_groups[0]
    assert torch.equal(ours.state[p]["exp_avg.codes"], bitsandbytes_state()["state1"])
    assert torch.equal(ours.state[small]["exp_avg_sq"], source.state[small]["state2"])
    train([p, small], ours, 1)
    assert ours.state[p]["step"].item() == 3

    wide = ng.optim.from_torch(source, state_dtype="fp32")
    expected = codec.decode_state(
        {"codes": bitsandbytes_state()["state1"], "scale": bitsandbytes_state()["absmax1"]},
        "int8",
        shape=p.shape,
    )
    assert torch.equal(wide.state[p]["exp_avg"], expected)
    source.args.percentile_clipping = 5
    with pytest.raises(ValueError, match="percentile_clipping=5"):
        ng.optim.from_torch(source)


def test_lion_of_bitsandbytes() -> None:
    p = nn.Parameter(torch.randn(9, 57))
    source = of("bitsandbytes", "Lion8bit", [p])
    source.state[p] = {name: value for name, value in bitsandbytes_state().items() if not name.endswith("2")}
    ours = ng.optim.from_torch(source, min_quantized_size=256)
    assert type(ours) is ng.optim.Lion
    assert torch.equal(ours.state[p]["exp_avg.codes"], source.state[p]["state1"])
    train([p], ours, 1)


def test_torchao() -> None:
    p, odd = nn.Parameter(torch.randn(32, 136)), nn.Parameter(torch.randn(4099))
    source = of("torchao", "Adam4bit", [p, odd], amsgrad=False)
    source.bf16_stochastic_round = True

    def low_bit(x: Tensor, signed: bool) -> Any:
        qmap = codec.code_map("int4", signed)
        encoded = encode_state(x, "int4", signed=signed)
        return SimpleNamespace(**encoded, qmap=qmap, signed=signed, shape=x.shape)

    m, v = torch.randn(32, 136), torch.rand(32, 136)
    source.state[p] = {
        "step": torch.tensor(2.0),
        "exp_avg": low_bit(m, True),
        "exp_avg_sq": low_bit(v, False),
    }
    # torchao leaves alone what its blocks do not divide
    source.state[odd] = {
        "step": torch.tensor(2.0),
        "exp_avg": torch.randn(4099),
        "exp_avg_sq": torch.rand(4099),
    }
    ours = ng.optim.from_torch(source)
    assert type(ours) is ng.optim.Adam
    assert (ours.defaults["state_dtype"], ours.defaults["param_update"]) == ("int4", "stochastic")
    assert torch.equal(ours.state[p]["exp_avg.codes"], encode_state(m, "int4")["codes"])
    expected = encode_state(source.state[odd]["exp_avg_sq"], "int4", signed=False)
    assert torch.equal(ours.state[odd]["exp_avg_sq.codes"], expected["codes"])
    wide = ng.optim.from_torch(source, state_dtype="int8")
    near = wide.dequantized_state_dict()["state"][0]["exp_avg"]
    coarse = codec.decode_state(encode_state(m, "int4"), "int4", shape=m.shape)
    assert (near - coarse).norm() < 0.02 * coarse.norm()


def test_what_is_not_taken() -> None:
    params = parameters((3,))

    class AdamW(torch.optim.AdamW):
        pass

    for source in (AdamW(params), torch.optim.Rprop(params), of("somewhere", "AdamW", params)):
        with pytest.raises(TypeError, match=r"accepted are exactly the classes torch\.optim\."):
            ng.optim.from_torch(source)
    assert {"torch.optim.AdamW", "bitsandbytes's AdamW8bit", "torchao's AdamWFp8"} <= set(supported())
    with pytest.raises(TypeError, match="unexpected argument 'state_type'"):
        ng.optim.from_torch(torch.optim.AdamW(params), state_type="int8")
    with pytest.raises(ValueError, match="state_dtype must be one of"):
        ng.optim.from_torch(torch.optim.AdamW(params), state_dtype="int7")
    with pytest.raises(ValueError, match="differentiable=True is not offered"):
        ng.optim.from_torch(torch.optim.AdamW(params, differentiable=True))
    broken = torch.optim.AdamW(params)
    train(params, broken, 1)
    broken.state[params[0]]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match="exp_avg has shape"):
        ng.optim.from_torch(broken)
