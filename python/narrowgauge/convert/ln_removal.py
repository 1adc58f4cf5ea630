"""Folding LayerNorms of constant standard deviation into the linear layers behind them (arXiv 2507.02559)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from narrowgauge.convert import _families
from narrowgauge.convert._parts import Plan, fold_affine, untie
from narrowgauge.norm import FixedStdLayerNorm
from narrowgauge.swap import Unsuitable, _check_bare

NAME = "fold_fixed_layernorm"


def fold_fixed_layernorm(
    model: nn.Module,
    readers: Mapping[str, Sequence[str]] | None = None,
    *,
    inplace: bool = False,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Folds every frozen `FixedStdLayerNorm` into the linear layers that read it, exactly.

    ``W x + c`` behind the norm becomes ``W' x + c'`` with ``W' = W diag(weight / sigma) (I - 11'/d)`` and ``c' = c + W
    bias``, and the norm an ``nn.Identity``. No reduction over rows is left.

    Args:
        model: A model whose `FixedStdLayerNorm` layers are all frozen.
        readers: For each of these layers the names of all linear layers that read it; nothing else may. Default: found
            by the names of GPT-2 and ViT in Transformers and timm.
        inplace: Change ``model`` itself instead of a deep copy. Default False.
        dtype: In which the new weights are computed. Default float64.

    Returns:
        The folded model. A linear layer without bias gets one where it needs it; a head that shares its weight with the
        embedding gets a weight of its own.

    Raises:
        ValueError: A norm is not frozen, has a constant of its own for position 0, or is read by something that is not
            linear or not known. The model is as it was.

    Source: arXiv 2507.02559.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    model = model if inplace else copy.deepcopy(model)
    plan = Plan(NAME, model, dtype)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, FixedStdLayerNorm)}
    if not norms:
        raise ValueError(f"{NAME}: the model has no FixedStdLayerNorm")
    following: Mapping[str, Sequence[str] | None] = (
        _families.roles_of(NAME, model).readers if readers is None else readers
    )
    for name in following:
        if readers is not None and name not in norms:
            raise ValueError(f"{NAME}: readers names {name!r}, which is no FixedStdLayerNorm of the model")
    folded: set[nn.Module] = set()
    for name, norm in norms.items():
        deviation = _constant(plan, name, norm)
        linear_names = following.get(name)
        if not linear_names:
            raise plan.refuse(
                name, "it is not known which linear layers read it, or something else does; give readers"
            )
        scale = norm.weight.detach().to(dtype) / deviation
        shift = None if norm.bias is None else norm.bias.detach().to(dtype)
        for linear_name in linear_names:
            linear = plan.module(linear_name)
            if linear in folded:
                raise plan.refuse(linear_name, "reads more than one norm")
            folded.add(linear)
            _fold(plan, name, linear_name, linear, scale, shift)
        plan.modules[norm] = nn.Identity()
    plan.apply()
    return model


def _constant(plan: Plan, name: str, norm: FixedStdLayerNorm) -> Tensor:
    """The frozen standard deviation, one for all positions."""
    try:
        _check_bare(norm, {"weight", "bias"}, buffers=True)
    except Unsuitable as reason:
        raise plan.refuse(name, reason) from None
    if not norm.frozen:
        raise plan.refuse(name, "is not frozen: call freeze() first")
    if norm.follow:
        raise plan.refuse(name, "its constant follows the running value: set follow = False first")
    pair = norm.fixed_std.to(plan.dtype)
    if norm.special_first and not torch.equal(pair[0], pair[1]):
        raise plan.refuse(name, "has a constant of its own for position 0: call drop_special_first() first")
    return pair[1]


def _fold(
    plan: Plan, name: str, linear_name: str, linear: nn.Module, scale: Tensor, shift: Tensor | None
) -> None:
    place = (linear, "weight")
    try:
        axis = fold_affine(plan, linear, scale.numel(), scale, shift)
    except Unsuitable as reason:
        raise plan.refuse(f"{linear_name}, which reads {name}", reason) from None
    untie(plan, place, [place])
    plan.values[place] = plan.values[place] - plan.values[place].mean(axis, keepdim=True)
