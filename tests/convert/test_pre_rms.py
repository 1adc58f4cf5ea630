"""Pre-LN models converted to RMSNorm and CRMSNorm compute what they did."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import golden_files
from tests.convert.models import (
    GPT2LMHeadModel,
    HFViT,
    NanoLayerNorm,
    PostNormBlock,
    TimmVisionTransformer,
    attend,
    randomize,
)
from torch import Tensor, nn

import narrowgauge as ng
from narrowgauge.convert import convert_pre_ln_to_rms

TOKENS = torch.arange(14).view(2, 7) % 19
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def nano(bias: bool) -> nn.Module:
    """GPT-2 with linear layers and norms of its own, as nanoGPT writes it."""
    model = GPT2LMHeadModel()
    for block in model.transformer.h:
        block.ln_1, block.ln_2 = NanoLayerNorm(12, bias), NanoLayerNorm(12, bias)
        block.attn.c_attn, block.attn.c_proj = nn.Linear(12, 36, bias=bias), nn.Linear(12, 12, bias=bias)
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(12, 48, bias=bias), nn.Linear(48, 12, bias=bias)
    model.transformer.ln_f = NanoLayerNorm(12, bias)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "gpt2": (GPT2LMHeadModel, TOKENS),
    "gpt2 untied": (lambda: GPT2LMHeadModel(tied=False), TOKENS),
    "nanogpt": (lambda: nano(True), TOKENS),
    "nanogpt without bias": (lambda: nano(False), TOKENS),
    "timm": (TimmVisionTransformer, IMAGES),
    "timm layer scale": (lambda: TimmVisionTransformer(scale=True), IMAGES),
    "timm norm_pre": (lambda: TimmVisionTransformer(pre_norm=True), IMAGES),
    "timm patch norm": (lambda: TimmVisionTransformer(patch_norm=True), IMAGES),
    "timm average": (lambda: TimmVisionTransformer(average=True), IMAGES),
    "timm distilled": (lambda: TimmVisionTransformer(distilled=True), IMAGES),
    "hf vit": (HFViT, IMAGES),
    "hf dino": (lambda: HFViT(dino=True), IMAGES),
}
each_model = pytest.mark.parametrize(("build", "data"), MODELS.values(), ids=MODELS)


def norms_of(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules() if "norm" in type(m).__name__.lower()}


def streams_of(model: nn.Module) -> list[Tensor]:
    return next(m for m in model.modules() if hasattr(m, "streams")).streams


@each_model
@pytest.mark.filterwarnings("ignore:convert_pre_ln_to_rms. converted for inference")
@pytest.mark.parametrize("compress", [False, True], ids=["rms", "crms"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_function_stays(
    build: Callable[[], nn.Module], data: Tensor, compress: bool, backend: Any
) -> None:
    model = randomize(build())
    before = copy.deepcopy(model.state_dict())
    expected = model(data)
    converted = convert_pre_ln_to_rms(model, compress=compress)
    with ng.backend(backend):
        actual = converted(data)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert norms_of(converted) <= {
        ng.nn.CRMSNorm if compress else ng.nn.RMSNorm,
        *norms_of_embedding(converted),
    }
    for stream in streams_of(converted):
        assert stream.shape[-1] == (11 if compress else 12)
        if not compress:
            assert stream.mean(-1).abs().max() <= 1e-12
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    if not compress:
        assert dict(converted.named_modules()).keys() >= dict(model.named_modules()).keys()


def norms_of_embedding(model: nn.Module) -> set[type]:
    return {t for t in norms_of(model) if t.__name__ == "_CentredLayerNorm"}


def test_the_state_fits_the_layer_norm_model() -> None:
    """An RMSNorm of a zero-mean stream is a LayerNorm of it."""
    model = randomize(GPT2LMHeadModel(tied=False))
    converted = convert_pre_ln_to_rms(model)
    other = GPT2LMHeadModel(tied=False).double().eval()
    other.load_state_dict(converted.state_dict())
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=1e-10, atol=1e-10)
    assert not torch.equal(other.transformer.wte.weight, model.transformer.wte.weight)


def test_in_place_keeps_the_parameters() -> None:
    model = randomize(GPT2LMHeadModel(tied=False))
    parameters, expected = dict(model.named_parameters()), model(TOKENS)
    assert convert_pre_ln_to_rms(model, inplace=True) is model
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name], name
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-10, atol=1e-10)


def test_tied_weights() -> None:
    model = randomize(GPT2LMHeadModel())
    expected = model(TOKENS)
    untied = convert_pre_ln_to_rms(model)
    assert torch.equal(untied.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(untied.transformer.wte.weight, untied.lm_head.weight)
    assert (untied.config.tie_word_embeddings, model.config.tie_word_embeddings) == (False, True)
    tied = convert_pre_ln_to_rms(model, untie=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert torch.equal(tied.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(tied(TOKENS), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"writer transformer.wte: shares its weight .* untie=True"):
        convert_pre_ln_to_rms(model, untie=False, compress=True)


def test_float32_and_bfloat16() -> None:
    model = randomize(TimmVisionTransformer(scale=True)).float()
    converted = convert_pre_ln_to_rms(model)
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    torch.testing.assert_close(converted(IMAGES.float()), model(IMAGES.float()), rtol=1e-4, atol=1e-4)
    converted = convert_pre_ln_to_rms(model.bfloat16())
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert converted(IMAGES.bfloat16()).isfinite().all()


def test_compiles_whole() -> None:
    model = convert_pre_ln_to_rms(randomize(TimmVisionTransformer()))
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=False)
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-10, atol=1e-10)


# --- what is refused, and leaves the model as it was ---


def refuse(model: nn.Module, error: type[Exception], message: str, **options: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    with pytest.raises(error, match=message):
        convert_pre_ln_to_rms(model, inplace=True, **options)
    assert list(model.modules()) == modules
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_post_norm_block_of_the_same_names() -> None:
    refuse(randomize(TimmVisionTransformer(block=PostNormBlock)), ValueError, "blocks.0 .* is not Pre-LN")


def test_what_is_not_known() -> None:
    model = randomize(GPT2LMHeadModel())
    model.transformer.h[1].adapter = nn.Linear(12, 12).double()
    refuse(model, ValueError, "not known what transformer.h.1.adapter does to the residual stream")
    refuse(nn.Sequential(nn.Linear(3, 3)), ValueError, "of no known family .* explicit lists")
    refuse(
        nn.ModuleList([randomize(GPT2LMHeadModel()), randomize(GPT2LMHeadModel())]),
        ValueError,
        "2 transformers",
    )


def test_residual_dropout() -> None:
    model = randomize(GPT2LMHeadModel(p=0.1))
    with pytest.warns(UserWarning, match=r"training with the dropout .*transformer.drop"):
        convert_pre_ln_to_rms(model)
    refuse(model.train(), ValueError, r"dropout on the residual stream \(transformer.drop.* model.eval\(\)")
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module is not model.transformer.h[0].attn.attn_dropout:
            module.p = 0.0
    convert_pre_ln_to_rms(model)


def test_what_cannot_be_rewritten() -> None:
    model = randomize(GPT2LMHeadModel())
    handle = model.transformer.h[0].mlp.c_proj.register_forward_hook(lambda *_: None)
    refuse(model, ValueError, "writer transformer.h.0.mlp.c_proj: has hooks")
    handle.remove()
    model.transformer.wte.max_norm = 1.0
    refuse(model, ValueError, "writer transformer.wte: an embedding with max_norm")
    model.transformer.wte.max_norm = None
    model.transformer.h[0].ln_1 = nn.RMSNorm(12).double()
    refuse(model, ValueError, "reader transformer.h.0.ln_1: a RMSNorm does not compute a LayerNorm")
    bare = randomize(GPT2LMHeadModel()).transformer
    refuse(bare, ValueError, "reader ln_f: compress=True needs the linear layers", compress=True)
    refuse(bare, TypeError, "dtype must be a floating-point dtype", dtype=torch.int64)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        convert_pre_ln_to_rms("gpt2")


def test_explicit_lists_are_checked() -> None:
    model = randomize(TimmVisionTransformer(scale=True))
    readers = ["blocks.0.norm1"]
    refuse(model, ValueError, "both writers and readers", readers=readers)
    refuse(
        model,
        ValueError,
        "no module or parameter 'cls_tokn'; did you mean cls_token",
        writers=["cls_tokn"],
        readers=readers,
    )
    refuse(
        model,
        ValueError,
        "writer blocks.0.attn.qkv: its weight has 36 outputs",
        writers=["blocks.0.attn.qkv"],
        readers=readers,
    )
    refuse(
        model,
        ValueError,
        "writer blocks.0: a TimmBlock is not a linear layer",
        writers=["blocks.0"],
        readers=readers,
    )
    refuse(
        model, ValueError, "reader head: a Linear is not a LayerNorm", writers=["cls_token"], readers=["head"]
    )
    refuse(
        model,
        ValueError,
        "scale head: has 2 parameters",
        writers=[("blocks.0.attn.proj", "head")],
        readers=readers,
    )
    refuse(model, ValueError, "at least one writer", writers=[], readers=readers)
    refuse(
        model, ValueError, "blocks.0.act, which reads|no module", writers=["cls_token"],
        readers={"blocks.0.norm1": ["blocks.0.act"]}, compress=True,
    )  # fmt: skip


# --- the recorded ViT ---


class GoldenViT(nn.Module):
    """The ViT of tests/golden/pre_rmsnorm, with its stacked weights taken apart."""

    def __init__(self, case: dict[str, Tensor], meta: dict[str, Any]) -> None:
        super().__init__()
        self.heads = meta["heads"]
        d = meta["dim"]

        def linear(name: str, index: Any = ...) -> nn.Linear:
            weight, bias = case[f"param_{name}_weight"][index], case[f"param_{name}_bias"][index]
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
            layer.load_state_dict({"weight": weight, "bias": bias})
            return layer

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d, meta["eps"], elementwise_affine=False)

        self.patch = linear("patch_linear")
        self.position = nn.Parameter(case["param_pos_embedding"].clone())
        self.cls_token = nn.Parameter(case["param_cls_token"].clone())
        self.blocks = nn.ModuleList()
        for i in range(meta["depth"]):
            block = nn.Module()
            block.norm1, block.norm2 = norm(), norm()
            block.qkv, block.out = linear("att_in_linear", i), linear("att_out_linear", i)
            block.mlp_in, block.mlp_out = linear("mlp_in_linear", i), linear("mlp_out_linear", i)
            self.blocks.append(block)
        self.norm, self.head = norm(), linear("cls_head_linear")

    def forward(self, patches: Tensor) -> Tensor:
        x = self.patch(patches) + self.position
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            q, k, v = block.qkv(block.norm1(x)).chunk(3, -1)
            x = x + block.out(attend(q, k, v, self.heads, causal=False))
            x = x + block.mlp_out(F.gelu(block.mlp_in(block.norm2(x))))
        return self.head(self.norm(x)[:, 0])

    def recorded(self, prefix: str, case: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Our parameters and those of the file."""
        single = {"patch_linear": self.patch, "cls_head_linear": self.head}
        stacked = {
            "att_in_linear": "qkv",
            "att_out_linear": "out",
            "mlp_in_linear": "mlp_in",
            "mlp_out_linear": "mlp_out",
        }
        pairs = []
        for name, value in case.items():
            if not name.startswith(prefix):
                continue
            name = name.removeprefix(prefix)
            layer, _, key = name.rpartition("_")
            if name in ("pos_embedding", "cls_token"):
                pairs.append((self.position if name == "pos_embedding" else self.cls_token, value))
            elif layer in single:
                pairs.append((getattr(single[layer], key), value))
            else:
                ours = torch.stack([getattr(getattr(block, stacked[layer]), key) for block in self.blocks])
                pairs.append((ours, value))
        assert pairs
        return pairs


@pytest.mark.parametrize("path", golden_files.files("pre_rmsnorm", "vit_*.npz"), ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_recorded_conversion(path: Path, backend: Any) -> None:
    case, meta = golden_files.read(path)
    model = GoldenViT(case, meta)
    branches = [f"blocks.{i}.{name}" for i in range(meta["depth"]) for name in ("out", "mlp_out")]
    writers = ["patch", "position", "cls_token", *branches]
    readers = {"norm": ["head"]}
    for i in range(meta["depth"]):
        readers |= {f"blocks.{i}.norm1": [f"blocks.{i}.qkv"], f"blocks.{i}.norm2": [f"blocks.{i}.mlp_in"]}
    with ng.backend(backend):
        torch.testing.assert_close(model(case["in_x"]), case["out_pre_ln_result"], rtol=1e-10, atol=1e-10)
        for compress, prefix, out in ((False, "param_zm_", "rms"), (True, "param_compressed_", "crms")):
            converted = convert_pre_ln_to_rms(model, writers=writers, readers=readers, compress=compress)
            for ours, recorded in converted.recorded(prefix, case):
                torch.testing.assert_close(ours.detach(), recorded, rtol=1e-14, atol=1e-14)
            y = converted(case["in_x"])
            torch.testing.assert_close(y, case[f"out_pre_{out}_result"], rtol=1e-10, atol=1e-10)


# --- the real libraries, where they are installed ---


def test_gpt2_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=19, n_positions=16, n_embd=12, n_layer=2, n_head=3)
    model = randomize(transformers.GPT2LMHeadModel(config))
    with pytest.warns(UserWarning, match="converted for inference"):
        converted = convert_pre_ln_to_rms(model)
    torch.testing.assert_close(converted(TOKENS).logits, model(TOKENS).logits, rtol=1e-10, atol=1e-10)


def test_vit_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    model = randomize(transformers.ViTForImageClassification(config))
    for compress in (False, True):
        converted = convert_pre_ln_to_rms(model, compress=compress)
        torch.testing.assert_close(converted(IMAGES).logits, model(IMAGES).logits, rtol=1e-10, atol=1e-10)


def test_vit_of_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 7}
    model = randomize(timm.models.vision_transformer.VisionTransformer(**sizes, init_values=1e-2))
    for compress in (False, True):
        converted = convert_pre_ln_to_rms(model, compress=compress)
        torch.testing.assert_close(converted(IMAGES), model(IMAGES), rtol=1e-10, atol=1e-10)
