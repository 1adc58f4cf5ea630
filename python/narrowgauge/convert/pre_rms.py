"""Pre-LN transformers as Pre-RMSNorm and Pre-CRMSNorm ones (Jiang et al., arXiv 2305.14858)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from narrowgauge.convert import _families
from narrowgauge.convert._parts import (
    Norm,
    Place,
    Plan,
    along,
    fold_affine,
    is_conv1d_of_transformers,
    output_axes,
    untie,
)
from narrowgauge.norm import CRMSNorm, LayerNorm, RMSNorm
from narrowgauge.swap import Unsuitable, _check_bare

NAME = "convert_pre_ln_to_rms"
Writers = Sequence[str | tuple[str, str]]
Readers = Sequence[str] | Mapping[str, Sequence[str]]


class _CentredEmbedding(nn.Embedding):
    """An embedding re-centred in each call, because its weight is also used elsewhere."""

    def forward(self, tokens: Tensor) -> Tensor:
        y = super().forward(tokens)
        return y - y.mean(-1, keepdim=True)


class _CentredLayerNorm(LayerNorm):
    """A LayerNorm whose output is re-centred: one behind the embedding, which writes into the stream."""

    drop_last = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y = y - y.mean(-1, keepdim=True)
        return y[..., :-1] if self.drop_last else y


def convert_pre_ln_to_rms(
    model: nn.Module,
    *,
    inplace: bool = False,
    writers: Writers | None = None,
    readers: Readers | None = None,
    untie: bool = True,
    compress: bool = False,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Rewrites a Pre-LN transformer as one with RMSNorm that computes the same.

    What writes into the residual stream is re-centred over the width, so the stream has mean zero and a LayerNorm that
    reads it is an RMSNorm.

    Args:
        model: GPT-2 and ViT with the names of Transformers or timm (DeiT, DINOv2, nanoGPT too) are known; other models
            need `writers` and `readers`.
        inplace: Change ``model`` itself instead of a deep copy. Default False.
        writers: Names of the modules or parameters that write into the residual stream: embeddings, class token,
            position embedding, the last projection of each branch, a LayerNorm behind the embedding. A pair ``(writer,
            scale)`` names the factor per channel behind it (LayerScale) too, which is folded into the writer.
        readers: Names of the LayerNorms that read the stream, the final one included. With `compress` a mapping from
            each to the names of the linear layers that read it.
        untie: Give an embedding that shares its weight with the head a weight of its own. With False it stays shared,
            and the embedding is re-centred in each call instead. Default True.
        compress: Store the zero-mean stream without its last channel (Pre-CRMSNorm, width d - 1): one width that is
            rarely a multiple of what hardware likes. Default False.
        dtype: In which the new weights are computed. Default float64.

    Returns:
        The converted model, whose modules have the names they had. A folded LayerScale is an ``nn.Identity``.

    Raises:
        ValueError: A reader or writer is not known, is none, or cannot be rewritten; residual dropout is active.
            The model is as it was.

    Hidden states that leave the model without a norm are those of the zero-mean stream. Further training is that of an
    RMSNorm model; `narrowgauge.nn.ZeroMeanLinear` keeps the LayerNorm model's gradients. Source: arXiv 2305.14858.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    if (writers is None) != (readers is None):
        raise ValueError(f"{NAME}: give both writers and readers, or neither")
    if not dtype.is_floating_point:
        raise TypeError(f"{NAME}: dtype must be a floating-point dtype, got {dtype}")
    model = model if inplace else copy.deepcopy(model)
    plan = Plan(NAME, model, dtype)
    roles = (
        _families.roles_of(NAME, model) if writers is None or readers is None else _explicit(writers, readers)
    )

    norms: dict[str, Norm] = {}
    for name in roles.readers:
        try:
            norms[name] = Norm(plan.module(name))
        except Unsuitable as reason:
            raise plan.refuse(f"reader {name}", reason) from None
    if not norms or not roles.writers:
        raise ValueError(f"{NAME}: there must be at least one writer and one reader")
    width = next(iter(norms.values())).width
    for name, norm in norms.items():
        if norm.width != width:
            raise plan.refuse(f"reader {name}", f"normalizes over {norm.width}, the others over {width}")
    _check_dropouts(plan, roles)
    if roles.blocks:
        _families.check_blocks_are_pre_ln(NAME, model, roles, width)
    if compress and width < 2:
        raise ValueError(f"{NAME}: a stream of width {width} cannot be compressed")

    _rewrite_writers(plan, roles, width, untie, compress)
    for name, norm in norms.items():
        if compress:
            _compress_reader(plan, name, norm, roles.readers[name])
        else:
            plan.modules[norm.module] = _rms_norm(norm)
    plan.apply()
    return model


def _explicit(writers: Writers, readers: Readers) -> _families.Roles:
    pairs: list[tuple[str, str | None]] = [(w, None) if isinstance(w, str) else (w[0], w[1]) for w in writers]
    following = {name: tuple(readers[name]) if isinstance(readers, Mapping) else None for name in readers}
    return _families.Roles("", dict(pairs), following, [], [])


def _check_dropouts(plan: Plan, roles: _families.Roles) -> None:
    active = []
    for name in roles.dropouts:
        module = plan.module(name)
        if getattr(module, "p", 0.0) > 0:
            active.append((name, module.training))
    names = ", ".join(name for name, _ in active[:3]) + (", ..." if len(active) > 3 else "")
    if any(training for _, training in active):
        raise ValueError(
            f"{NAME}: dropout on the residual stream ({names}) breaks its zero mean in training; set p = 0 there, or "
            "call model.eval() to convert for inference"
        )
    if active:
        warnings.warn(
            f"{NAME}: converted for inference; training with the dropout on the residual stream ({names}) is not that "
            "of the LayerNorm model",
            stacklevel=3,
        )


def _rewrite_writers(plan: Plan, roles: _families.Roles, width: int, may_untie: bool, compress: bool) -> None:
    axes: dict[str, dict[Place, int]] = {}
    for name in roles.writers:
        part = plan.part(name)
        if isinstance(part, (nn.LayerNorm, LayerNorm)):
            _centre_norm(plan, name, part, compress)
            continue
        try:
            axes[name] = output_axes(part)
        except Unsuitable as reason:
            raise plan.refuse(f"writer {name}", reason) from None
        for owner, key in axes[name]:
            size = owner._parameters[key].shape[axes[name][owner, key]]  # type: ignore[union-attr]
            if size != width:
                raise plan.refuse(
                    f"writer {name}", f"its {key} has {size} outputs; the stream has width {width}"
                )

    every_place = [place for places in axes.values() for place in places]
    done: dict[int, Tensor] = {}
    for name, places in axes.items():
        scale = _scale(plan, roles.writers[name], width)
        for place, axis in places.items():
            owner, key = place
            if plan.shared_elsewhere(place, every_place) and not may_untie:
                _keep_tied(plan, name, owner, compress)
                continue
            untie(plan, place, every_place)
            value = plan.value(place)
            assert value is not None
            if scale is not None:
                value = value * along(scale.to(value.device), axis, value.dim())
            value = value - value.mean(axis, keepdim=True)
            if compress:
                value = value.narrow(axis, 0, width - 1)
            if not torch.equal(done.setdefault(id(owner._parameters[key]), value), value):
                raise plan.refuse(f"writer {name}", f"shares its {key} with a writer of another scale")
            plan.values[place] = value
        if compress:
            _note_width(plan, plan.part(name), width - 1)


def _scale(plan: Plan, name: str | None, width: int) -> Tensor | None:
    """The factor per channel behind a writer, which becomes the identity."""
    if name is None:
        return None
    part = plan.part(name)
    if isinstance(part, tuple):
        value = plan.value(part)
        assert value is not None
        plan.values[part] = torch.ones_like(value)
    else:
        parameters = [p for p in part._parameters.values() if p is not None]
        try:
            _check_bare(part, set(part._parameters))
        except Unsuitable as reason:
            raise plan.refuse(f"scale {name}", reason) from None
        if len(parameters) != 1:
            raise plan.refuse(f"scale {name}", f"has {len(parameters)} parameters; expected one")
        plan.modules[part] = nn.Identity()
        value = parameters[0].detach().to(plan.dtype)
    if value.numel() not in (1, width):
        raise plan.refuse(f"scale {name}", f"has shape {tuple(value.shape)}; expected ({width},)")
    return value.flatten().expand(width)


def _keep_tied(plan: Plan, name: str, owner: nn.Module, compress: bool) -> None:
    if compress or not isinstance(owner, nn.Embedding):
        raise plan.refuse(f"writer {name}", "shares its weight with another module; use untie=True")
    twin = _CentredEmbedding.__new__(_CentredEmbedding)
    twin.__dict__ = dict(owner.__dict__)
    plan.modules[owner] = twin


def _centre_norm(plan: Plan, name: str, norm: nn.Module, compress: bool) -> None:
    try:
        found = Norm(norm)
    except Unsuitable as reason:
        raise plan.refuse(f"writer {name}", reason) from None
    new = _CentredLayerNorm(
        found.width, found.eps, found.weight is not None, found.bias is not None, found.offset, device="meta"
    )
    new.drop_last = compress
    plan.modules[norm] = _take_parameters(new, found)


def _take_parameters(new: nn.Module, norm: Norm) -> nn.Module:
    new._parameters.update(weight=norm.weight, bias=norm.bias)
    return new.train(norm.module.training)


def _rms_norm(norm: Norm) -> nn.Module:
    new = RMSNorm(
        norm.width, norm.eps, norm.weight is not None, norm.offset, bias=norm.bias is not None, device="meta"
    )
    return _take_parameters(new, norm)


def _compress_reader(plan: Plan, name: str, norm: Norm, following: Sequence[str] | None) -> None:
    if not following:
        raise plan.refuse(
            f"reader {name}",
            "compress=True needs the linear layers that read it, and nothing else may: give readers as a "
            "mapping from each norm to them",
        )
    for linear_name in following:
        linear = plan.module(linear_name)
        shared = plan.shared_elsewhere((linear, "weight"), [(linear, "weight")])
        try:
            axis = fold_affine(plan, linear, norm.width, *norm.affine(plan.dtype))
        except Unsuitable as reason:
            raise plan.refuse(f"{linear_name}, which reads {name}", reason) from None
        if shared:
            untie(plan, (linear, "weight"), [(linear, "weight")])
        kept, last = plan.values[linear, "weight"].split([norm.width - 1, 1], axis)
        plan.values[linear, "weight"] = kept - last
        plan.attributes.append(
            (linear, "nx" if is_conv1d_of_transformers(linear) else "in_features", norm.width - 1)
        )
    plan.modules[norm.module] = CRMSNorm(norm.width - 1, norm.eps).train(norm.module.training)


def _note_width(plan: Plan, part: nn.Module | Place, width: int) -> None:
    """The size that a module remembers of its output."""
    if isinstance(part, nn.Module):
        for attribute in ("out_features", "out_channels", "embedding_dim", "nf"):
            if hasattr(part, attribute):
                plan.attributes.append((part, attribute, width))
