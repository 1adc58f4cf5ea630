"""Replacing the norms and linear layers of a model, and putting them back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import narrowgauge as ng
from narrowgauge.norm._replacement import norm_replacements

WIDTH = 24


class LlamaLike(nn.Module):
    """RMSNorm as Llama implementations write it: rounded before the weight, eps under a name of its own."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden.dtype)


class GemmaLike(nn.Module):
    """RMSNorm with a zero-centred weight."""

    def __init__(self, width: int, eps: float = 1e-3):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)
        return (wide * (self.weight.float() + 1)).to(hidden.dtype)


class EpsOutside(GemmaLike):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden / (hidden.square().mean(dim=-1, keepdim=True).sqrt() + self.eps) * self.weight


class PartialNorm(LlamaLike):
    """The statistics of the first half of the channels only."""

    def forward(self, hidden: Tensor) -> Tensor:
        first = hidden[..., : hidden.shape[-1] // 2]
        return self.weight * hidden * (first.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


class GatedNorm(LlamaLike):
    """Without a gate it computes an RMSNorm; with one it does not."""

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden if gate is None else hidden * gate)


class NeedsGpu(LlamaLike):
    def forward(self, hidden: Tensor) -> Tensor:
        raise RuntimeError("only on a GPU")


class ChannelsFirstNorm(nn.LayerNorm):
    """The kind of subclass that image model libraries have: same parameters, another axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class RenamedNorm(nn.LayerNorm):
    """A subclass that changes nothing."""


NORMS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(WIDTH, eps=1e-3), ng.nn.LayerNorm),
    "LayerNorm without bias": (lambda: nn.LayerNorm(WIDTH, bias=False), ng.nn.LayerNorm),
    "LayerNorm without affine": (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), ng.nn.LayerNorm),
    "LayerNorm of two dimensions": (lambda: nn.LayerNorm((3, WIDTH)), ng.nn.LayerNorm),
    "LayerNorm subclass": (lambda: RenamedNorm(WIDTH), ng.nn.LayerNorm),
    "RMSNorm": (lambda: nn.RMSNorm(WIDTH, eps=1e-3), ng.nn.RMSNorm),
    "RMSNorm with eps None": (lambda: nn.RMSNorm(WIDTH), ng.nn.RMSNorm),
    "RMSNorm without affine": (lambda: nn.RMSNorm(WIDTH, elementwise_affine=False), ng.nn.RMSNorm),
    "Llama's RMSNorm": (lambda: LlamaLike(WIDTH), ng.nn.RMSNorm),
    "Gemma's RMSNorm": (lambda: GemmaLike(WIDTH), ng.nn.RMSNorm),
}


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return randomized(
        nn.Sequential(
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, WIDTH),
            nn.Sequential(GemmaLike(WIDTH), nn.RMSNorm(WIDTH)),
            LlamaLike(WIDTH),
        )
    )


def left(report: ng.SwapReport) -> dict[str, str]:
    return {entry.name: entry.note for entry in report.left}


def outputs_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], direction)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_swapped_norm_computes_the_same(kind: str, dtype: torch.dtype) -> None:
    build, new_type = NORMS[kind]
    model = randomized(nn.Sequential(build())).to(dtype)
    x = torch.randn(5, 3, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0] *= 1e-3  # rows where eps matters
    expected = outputs_and_gradients(model, x)

    report = ng.swap(model)

    assert isinstance(model[0], new_type), report
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    if kind.endswith("'s RMSNorm"):
        tolerance = max(tolerance, 2e-5)  # the old one computes in float32 even for float64
    for got, wanted in zip(outputs_and_gradients(model, x), expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("kind", NORMS)
def test_parameters_state_dict_and_mode_stay(kind: str) -> None:
    model = nn.Sequential(NORMS[kind][0]()).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())

    ng.swap(model)

    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert not model[0].training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("eps", "dtype", "expected"),
    [
        (None, torch.float32, 2.0**-23),
        (None, torch.bfloat16, 2.0**-23),
        (None, torch.float64, 2.0**-52),
        (3e-4, torch.bfloat16, 3e-4),
    ],
)
def test_eps_of_torch_rms_norm(eps: float | None, dtype: torch.dtype, expected: float) -> None:
    model = nn.Sequential(nn.RMSNorm(WIDTH, eps=eps, dtype=dtype))
    ng.swap(model)
    assert model[0].eps == expected


def test_linear_is_replaced_on_request_only() -> None:
    model = small_model()
    weights = [model[0].weight, model[3].weight]
    assert not any("Linear" in entry.old for entry in ng.swap(model).replaced)
    assert type(model[0]) is nn.Linear

    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3))
    expected = outputs_and_gradients(model, x)
    report = ng.swap(model, linear="int8-row")

    assert [entry.name for entry in report.replaced] == ["0", "3"]
    assert [model[0].weight, model[3].weight] == weights
    got = outputs_and_gradients(model, x)
    for ours, exact in zip(got, expected, strict=True):
        error = (ours - exact).norm() / exact.norm()
        assert error < 0.05
    assert (got[0] - expected[0]).norm() > 1e-4 * expected[0].norm(), "nothing was quantized"


def test_the_filter_and_the_report() -> None:
    model = nn.Sequential(*(nn.LayerNorm(WIDTH) for _ in range(3)), nn.BatchNorm1d(WIDTH))
    report = ng.swap(model, filter=lambda name, module: name != "1")
    assert [entry.name for entry in report.replaced] == ["0", "2"]
    assert left(report) == {"1": "kept out by the filter", "3": "narrowgauge has no replacement for it"}
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "count", "old", "new", "note"]
    assert lines[1].split() == ["*", "2", "torch.LayerNorm", "narrowgauge.LayerNorm"]
    assert lines[-1] == "2 replaced, 2 left."


def test_the_report_as_a_rich_table() -> None:
    console = pytest.importorskip("rich.console", reason="rich is not installed").Console(
        width=120, file=io.StringIO()
    )
    console.print(ng.swap(nn.Sequential(nn.RMSNorm(WIDTH))))
    assert "narrowgauge.RMSNorm" in console.file.getvalue()


def test_swapping_twice_says_so_and_changes_nothing() -> None:
    model = small_model()
    ng.swap(model, linear="fp8-row")
    modules = list(model.modules())
    report = ng.swap(model, linear="fp8-row")
    assert list(model.modules()) == modules
    assert not report.replaced
    assert "every one of 6 is narrowgauge's already" in str(report)
    assert left(ng.swap(model, linear="int8-row"))["0"] == "has recipe fp8-row: unswap first"


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def with_parametrization(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", nn.Identity())


def with_replaced_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x
    return module


def with_buffer(module: nn.Module) -> nn.Module:
    module.register_buffer("seen", torch.zeros(()))
    return module


def with_parameter(module: nn.Module) -> nn.Module:
    module.register_parameter("gain", nn.Parameter(torch.zeros(())))
    return module


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: ChannelsFirstNorm(WIDTH), "overrides the forward of nn.LayerNorm"),
        (lambda: with_hook(nn.LayerNorm(WIDTH)), "has hooks"),
        (lambda: with_hook(nn.Linear(WIDTH, WIDTH)), "has hooks"),
        (lambda: with_parametrization(nn.LayerNorm(WIDTH)), "has parametrizations"),
        (lambda: with_parametrization(nn.Linear(WIDTH, WIDTH)), "has parametrizations"),
        (lambda: with_replaced_forward(nn.RMSNorm(WIDTH)), "its forward was replaced"),
        (lambda: with_buffer(nn.RMSNorm(WIDTH)), "has child modules or buffers"),
        (lambda: with_parameter(nn.RMSNorm(WIDTH)), "its parameters are not weight"),
        (lambda: EpsOutside(WIDTH), "computes neither"),
        (lambda: PartialNorm(WIDTH), "computes neither"),
        (lambda: GatedNorm(WIDTH), "more than one argument"),
        (lambda: NeedsGpu(WIDTH), "only on a GPU"),
        (lambda: nn.GroupNorm(2, WIDTH), "narrowgauge has no replacement for it"),
    ],
)
def test_modules_left_with_the_reason(build: Callable[[], nn.Module], reason: str) -> None:
    module = build()
    model = nn.Sequential(module)
    report = ng.swap(model, linear="int8-row")
    assert model[0] is module
    assert reason in left(report)["0"]


def test_attention_keeps_the_projection_it_reads_directly() -> None:
    attention = nn.MultiheadAttention(WIDTH, 2)
    report = ng.swap(attention, linear="int8-row")
    assert "never calls it" in left(report)["out_proj"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_agrees_on_its_slow_and_fast_paths(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 48, dropout=0.0, batch_first=True)
    model = randomized(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH))).train(training)
    x = torch.randn(2, 5, WIDTH)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():  # without gradients and in eval mode, the layer reads its norms' weights directly
        expected = model(x, src_key_padding_mask=padding)
        assert len(ng.swap(model).replaced) == 5
        got = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_module_under_several_names_is_replaced_once() -> None:
    shared = nn.LayerNorm(WIDTH)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.LayerNorm(WIDTH)})
    report = ng.swap(model)
    assert [entry.name for entry in report.replaced] == ["a, b.0", "c"]
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], ng.nn.LayerNorm)

    ng.unswap(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is nn.LayerNorm

    kept = ng.swap(model, filter=lambda name, module: name != "b.0")
    assert [entry.name for entry in kept.replaced] == ["c"]


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, WIDTH), "head": nn.Linear(WIDTH, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    ng.swap(model, linear="int8-row")
    assert isinstance(model["head"], ng.quant.Linear)
    assert model["head"].weight is model["embedding"].weight


def test_not_in_place() -> None:
    model = small_model()
    report = ng.swap(model, inplace=False)
    assert isinstance(model[1], nn.LayerNorm)
    assert isinstance(report.model[1], ng.nn.LayerNorm)
    assert report.model[1].weight is not model[1].weight


def test_a_model_that_is_itself_a_norm() -> None:
    norm = nn.LayerNorm(WIDTH)
    with pytest.raises(ValueError, match=r"cannot be replaced in place; use swap\(model, inplace=False\)"):
        ng.swap(norm)
    swapped = ng.swap(norm, inplace=False).model
    assert isinstance(swapped, ng.nn.LayerNorm)
    assert type(ng.unswap(swapped, inplace=False).model) is nn.LayerNorm


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"linear": "int7"}, ValueError, "linear must be one of None, 'int8-row'"),
        ({"norm": "gemma"}, ValueError, "norm must be one of True, False, .*; got 'gemma'"),
        ({"model": [nn.LayerNorm(3)]}, TypeError, "model must be a torch.nn.Module, got list"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ng.swap(**{"model": small_model(), **arguments})


def test_an_error_midway_leaves_the_model_as_it_was() -> None:
    model = small_model()
    modules = list(model.modules())

    def failing(name: str, module: nn.Module) -> bool:
        if name == "4.1":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        ng.swap(model, filter=failing)
    assert list(model.modules()) == modules


def test_unswap_restores_types_and_keeps_trained_values() -> None:
    model = small_model()
    before = [(name, type(module)) for name, module in model.named_modules()]
    printed, keys = repr(model), list(model.state_dict())
    ng.swap(model, linear="int8-row")
    model.eval()
    with torch.no_grad():
        model[1].weight += 1
    model[5].weight = nn.Parameter(torch.full((WIDTH,), 7.0))  # as load_state_dict(assign=True) does
    state = {name: value.clone() for name, value in model.state_dict().items()}

    report = ng.unswap(model)

    assert len(report.replaced) == 6
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert repr(model) == printed
    assert list(model.state_dict()) == keys
    assert not model[5].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model[4][1].eps is None
    assert str(ng.unswap(model)).startswith("Nothing to replace")


def test_unswap_leaves_a_module_that_has_hooks_since() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH))
    ng.swap(model)
    with_hook(model[0])
    assert left(ng.unswap(model)) == {"0": "has hooks"}
    assert isinstance(model[0], ng.nn.LayerNorm)


def test_state_dicts_load_both_ways() -> None:
    plain, swapped = small_model(), ng.swap(randomized(small_model(), seed=1), linear="int8-row").model
    plain.load_state_dict(swapped.state_dict())
    ng.unswap(swapped)
    x = torch.randn(2, WIDTH)
    assert torch.equal(plain(x), swapped(x))
    ng.swap(swapped).model.load_state_dict(small_model().state_dict())


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_of_a_swapped_model_are_whole(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = small_model()
    ng.swap(model, linear="int8-row")
    x = torch.randn(4, WIDTH)
    twin = duplicate(model)
    assert torch.equal(twin(x), model(x))
    assert twin[1].weight is not model[1].weight

    ng.unswap(twin)
    ng.unswap(model)
    assert type(twin[1]) is nn.LayerNorm
    assert torch.equal(twin(x), model(x))


def test_the_replaced_modules_are_not_kept_alive_by_their_parameters() -> None:
    model = small_model()
    ng.swap(model, linear="int8-row")
    names = [name for name, _ in model.named_modules()]
    assert len(names) == len(list(small_model().named_modules()))
    old = vars(model[0])["_narrowgauge_original"]
    assert old._parameters == {"weight": None, "bias": None}


def test_models_on_the_meta_device_and_random_state() -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(WIDTH), GemmaLike(WIDTH))
        ng.swap(model)
    assert model[1].weight_offset == 1
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}


@pytest.mark.filterwarnings("ignore")  # what Transformers warns of at import changes with its version
@pytest.mark.parametrize(
    ("family", "norms", "offset"),
    [("Llama", 5, 0.0), ("Mistral", 5, 0.0), ("Qwen3", 9, 0.0), ("Gemma", 5, 1.0), ("Gemma2", 9, 1.0)],
)
def test_models_of_transformers(family: str, norms: int, offset: float) -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed (extra: hf)")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY)
    model = randomized(getattr(transformers, f"{family}ForCausalLM")(config)).eval()
    tokens = torch.arange(20).view(2, 10)

    def losses() -> list[Tensor]:
        model.zero_grad()
        out = model(input_ids=tokens, labels=tokens)
        out.loss.backward()
        return [out.loss.detach(), out.logits.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = losses()
    report = ng.swap(model)

    assert len(report.replaced) == norms, report
    assert not report.left, report
    found = [module for module in model.modules() if isinstance(module, ng.nn.RMSNorm)]
    assert {module.weight_offset for module in found} == {offset}
    assert {module.eps for module in found} == {config.rms_norm_eps}
    for got, wanted in zip(losses(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())

    ng.swap(model, linear="int8-row", filter=lambda name, module: name != "lm_head")
    loss = losses()[0]
    assert abs(loss - expected[0]) < 0.05 * expected[0]
    model.gradient_checkpointing_enable()
    model.train()
    torch.testing.assert_close(losses()[0], loss, rtol=1e-5, atol=1e-5)


# --- layers that compute something else ---

REPLACEMENTS = pytest.mark.parametrize("kind", sorted(norm_replacements))
OLD: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH, eps=1e-3),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=1e-3),
    "Llama's": lambda: LlamaLike(WIDTH),
}


@pytest.mark.parametrize(
    ("kind", "old"),
    [(kind, old) for kind in sorted(norm_replacements) for old in OLD if (kind, old[0]) != ("rms", "R")],
)
def test_another_layer_takes_the_parameters_and_gives_them_back(kind: str, old: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), randomized(OLD[old]()))
    replaced, x = model[1], torch.randn(2, 5, WIDTH)
    before = model(x)
    report = ng.swap(model, norm=kind)
    assert [entry.name for entry in report.replaced] == ["1"], str(report)
    assert type(model[1]).__module__.startswith("narrowgauge.norm")
    for name, parameter in replaced.named_parameters():
        assert model[1].get_parameter(name) is parameter
    y = model(x)
    assert y.shape == x.shape
    same = (kind, old) in (("rms", "Llama's"), ("fixed_std", "LayerNorm"))  # these compute what they replace
    assert y.allclose(before, rtol=1e-3) == same
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    ng.unswap(model)
    assert type(model[1]) is type(replaced)
    torch.testing.assert_close(model(x), before)


@REPLACEMENTS
def test_a_zero_centred_weight_does_not_fit_another_layer(kind: str) -> None:
    model = nn.Sequential(GemmaLike(WIDTH))
    report = ng.swap(model, norm=kind)
    assert "1 + w" in left(report)["0"]
    assert isinstance(model[0], GemmaLike)


@REPLACEMENTS
def test_ours_is_replaced_where_it_was_not_swapped_in(kind: str) -> None:
    model = nn.Sequential(ng.nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH))
    ng.swap(model, filter=lambda name, module: name == "1")
    report = ng.swap(model, norm=kind)
    assert [entry.name for entry in report.replaced] == ["0"]
    assert left(report)["1"] == "is narrowgauge's already: unswap first"


def test_a_layer_nobody_knows_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH))
    with pytest.raises(ValueError, match=r"norm must be one of True, False, .*'rms'.*; got 'batch'"):
        ng.swap(model, norm="batch")
    assert type(model[0]) is nn.LayerNorm
