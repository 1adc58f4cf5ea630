"""Which parts of the models that model libraries write do what to the residual stream, by their names alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Names below the trunk of a Pre-LN transformer. In a pattern, ``@`` is any block.

    Attributes:
        name: For errors.
        marks: Names by which a trunk is recognised.
        block: Pattern of a block.
        writers: Pattern of what writes into the stream.
        readers: The norms in a block, each with the linear layers that read it.
        final: Names of the last norm; the first that is there counts.
        embedding_norms: Names of norms behind the embedding, each with the pattern of the writers before it.
        scales: Writers in a block, each with the factor per channel that comes after it.
        inner: Pattern of what does neither read nor write.
        dropouts: Pattern of the dropouts on the stream.
        heads: What may read the last norm, beside or in the trunk.
    """

    name: str
    marks: tuple[str, ...]
    block: str
    writers: str
    readers: dict[str, tuple[str, ...]]
    final: tuple[str, ...]
    inner: str
    dropouts: str
    heads: tuple[str, ...]
    scales: dict[str, str] = field(default_factory=dict)
    embedding_norms: dict[str, str] = field(default_factory=dict)


FAMILIES = (
    Family(
        "GPT-2",
        marks=("wte", "wpe", "h.0.ln_1", "h.0.attn.c_proj", "ln_f"),
        block=r"h\.\d+",
        writers=r"wte|wpe|@\.(attn|crossattention|mlp)\.c_proj",
        readers={
            "ln_1": ("attn.c_attn",),
            "ln_cross_attn": ("crossattention.q_attn",),
            "ln_2": ("mlp.c_fc",),
        },
        final=("ln_f",),
        inner=r"@\.(attn\.c_attn|crossattention\.(c_attn|q_attn)|mlp\.c_fc)",
        dropouts=r"drop|@\.(attn|crossattention)\.resid_dropout|@\.mlp\.dropout",
        heads=("lm_head", "score", "classifier"),
    ),
    Family(
        "ViT of Transformers",
        marks=(
            "embeddings.patch_embeddings.projection",
            "encoder.layer.0.attention.output.dense",
            "layernorm",
        ),
        block=r"encoder\.layer\.\d+",
        writers=(
            r"embeddings\.(cls_token|distillation_token|mask_token|register_tokens|position_embeddings"
            r"|patch_embeddings\.projection)|@\.(attention\.output\.dense|output\.dense|mlp\.(fc2|weights_out))"
        ),
        readers={
            "layernorm_before": tuple(f"attention.attention.{n}" for n in ("query", "key", "value")),
            "layernorm_after": ("intermediate.dense",),
            "norm1": tuple(f"attention.attention.{n}" for n in ("query", "key", "value")),
            "norm2": ("mlp.fc1", "mlp.weights_in"),
        },
        final=("layernorm",),
        inner=r"@\.(attention\.attention\.(query|key|value)|intermediate\.dense|mlp\.(fc1|weights_in))|pooler\.dense",
        dropouts=r"embeddings\.dropout|@\.(attention\.output\.dropout|output\.dropout)",
        heads=("classifier", "cls_classifier", "distillation_classifier"),
        scales={
            "attention.output.dense": "layer_scale1",
            "mlp.fc2": "layer_scale2",
            "mlp.weights_out": "layer_scale2",
        },
    ),
    Family(
        "ViT of timm",
        marks=(
            "patch_embed.proj",
            "blocks.0.norm1",
            "blocks.0.attn.qkv",
            "blocks.0.attn.proj",
            "blocks.0.mlp.fc2",
        ),
        block=r"blocks\.\d+",
        writers=r"cls_token|dist_token|reg_token|pos_embed|patch_embed\.proj|@\.(attn\.proj|mlp\.fc2)",
        readers={"norm1": ("attn.qkv",), "norm2": ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x")},
        final=("norm", "fc_norm"),
        inner=r"@\.(attn\.(qkv|q_norm|k_norm|norm)|mlp\.(fc1|fc1_g|fc1_x|norm))|head|head_dist|attn_pool\..*",
        dropouts=r"pos_drop|@\.(attn\.proj_drop|mlp\.drop2)",
        heads=("head", "head_dist"),
        scales={"attn.proj": "ls1", "mlp.fc2": "ls2"},
        embedding_norms={
            "norm_pre": r"cls_token|dist_token|reg_token|pos_embed|patch_embed\.(proj|norm)",
            "patch_embed.norm": r"patch_embed\.proj",
        },
    ),
)


@dataclass
class Roles:
    """What was found in a model: full names.

    `writers` has for each writer the factor per channel behind it, or None. `readers` has for each norm the linear
    layers that read it; None where something else reads it, or may.
    """

    family: str
    writers: dict[str, str | None]
    readers: dict[str, tuple[str, ...] | None]
    dropouts: list[str]
    blocks: list[str]


def roles_of(function: str, model: nn.Module) -> Roles:
    """The roles of everything in a model of a known family; raises a ValueError that says what is not known."""
    found = [(family, trunk) for family in FAMILIES for trunk in _trunks(family, model)]
    if len(found) != 1:
        known = ", ".join(family.name for family in FAMILIES)
        what = "is of no known family" if not found else f"has {len(found)} transformers in it"
        raise ValueError(
            f"{function}: {type(model).__name__} {what} (known by their names: {known}); give explicit lists instead"
        )
    family, trunk = found[0]
    return _roles(function, model, family, trunk)


def _trunks(family: Family, model: nn.Module) -> Iterator[str]:
    names = {name for name, _ in model.named_modules()}
    for name in names:
        if name == family.marks[0] or name.endswith("." + family.marks[0]):
            trunk = name[: -len(family.marks[0])]
            if all(trunk + mark in names for mark in family.marks):
                yield trunk


def _roles(function: str, model: nn.Module, family: Family, trunk: str) -> Roles:
    modules = dict(model.named_modules(remove_duplicate=False))
    block = f"({family.block})"

    def matches(pattern: str, name: str) -> bool:
        return re.fullmatch(pattern.replace("@", block), name) is not None

    def in_block(name: str) -> tuple[str, str]:
        match = re.match(rf"{block}\.", name)
        return (match.group(), name[match.end() :]) if match else ("", name)

    # A part is a module with parameters of its own, or a parameter of a module that has other modules in it.
    parts: dict[str, None] = {}
    for full, _ in model.named_parameters(remove_duplicate=False):
        if full.startswith(trunk):
            owner, _, _key = full.rpartition(".")
            whole = owner if owner != trunk.rstrip(".") and not modules[owner]._modules else full
            parts[whole[len(trunk) :]] = None

    roles = Roles(family.name, {}, {}, [], [])
    skipped = ""
    for norm, before in family.embedding_norms.items():
        if norm in parts and not skipped:
            roles.writers[trunk + norm] = None
            skipped = before
    final = next((name for name in family.final if name in parts), None)
    unknown = []
    for part in parts:
        prefix, rest = in_block(part)
        if trunk + part in roles.writers or (skipped and matches(skipped, part)):
            continue
        if matches(family.writers, part):
            scale = family.scales.get(rest)
            held = modules.get(trunk + prefix + scale) if prefix and scale else None
            roles.writers[trunk + part] = (
                trunk + prefix + scale if scale and held is not None and [*held.parameters()] else None
            )
        elif prefix and rest in family.readers:
            following = tuple(
                trunk + prefix + name for name in family.readers[rest] if trunk + prefix + name in modules
            )
            roles.readers[trunk + part] = following or None
        elif part == final:
            roles.readers[trunk + part] = _heads(family, trunk, modules)
        elif not (
            matches(family.inner, part) or (prefix and rest in family.scales.values()) or part in family.final
        ):
            unknown.append(trunk + part)
    if unknown:
        raise ValueError(
            f"{function}: in this {family.name} it is not known what {', '.join(unknown)} does to the residual stream; "
            "give explicit lists instead"
        )
    roles.dropouts = [n for n in modules if n.startswith(trunk) and matches(family.dropouts, n[len(trunk) :])]
    roles.blocks = [n for n in modules if n.startswith(trunk) and matches("@", n[len(trunk) :])]
    return roles


def _heads(family: Family, trunk: str, modules: dict[str, nn.Module]) -> tuple[str, ...] | None:
    """The linear layers that read the last norm, if nothing else may."""
    names = [
        n for n in modules if n in family.heads or (n.startswith(trunk) and n[len(trunk) :] in family.heads)
    ]
    linear = [n for n in names if modules[n]._parameters.get("weight") is not None]
    allowed = (*linear, trunk.rstrip(".") or "-")
    for name, module in modules.items():
        outside = not (name + ".").startswith(trunk)
        pooled = name.startswith((trunk + "pooler", trunk + "attn_pool"))
        if (
            (outside or pooled)
            and any(p is not None for p in module._parameters.values())
            and name not in allowed
        ):
            return None
    return tuple(linear) or None


def check_blocks_are_pre_ln(function: str, model: nn.Module, roles: Roles, width: int) -> None:
    """A Pre-LN block moves a stream that is shifted by a constant by that constant, and changes it by the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, width, generator=generator, dtype=torch.float64)
    for name in roles.blocks:
        block = model.get_submodule(name)
        device = next(block.parameters()).device
        if device.type == "meta":
            continue
        twin = copy.deepcopy(block).double().eval()
        stream = x.to(device)
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                plain, shifted = (_first(twin(stream + shift)) for shift in (0.0, 3.0))
        except Exception as error:
            raise ValueError(
                f"{function}: {name} could not be tried on a small stream ({error}); give explicit lists instead"
            ) from error
        if not torch.allclose(plain + 3.0, shifted, rtol=1e-7, atol=1e-7):
            raise ValueError(
                f"{function}: {name} ({type(block).__name__}) is not Pre-LN: shifting the residual stream by a "
                "constant changes what the block adds to it"
            )


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
