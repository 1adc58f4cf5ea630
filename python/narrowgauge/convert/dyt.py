"""Replacing the norms of a model by Dynamic Tanh (arXiv 2503.10622), to train it without normalization."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping

from torch import nn

from narrowgauge import norm
from narrowgauge.norm import DyT

Alpha = float | Mapping[str, float] | Callable[[str, nn.Module], float | None]


def _normalized_shape(module: nn.Module) -> tuple[int, ...] | None:
    """What a LayerNorm or RMSNorm normalizes over, also one that a model library wrote for itself; None for others."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, norm.LayerNorm, norm.RMSNorm)):
        return tuple(module.normalized_shape)
    name = type(module).__name__.lower()
    weight = module._parameters.get("weight")
    if ("layernorm" in name or "rmsnorm" in name) and weight is not None and not module._modules:
        return tuple(weight.shape)
    return None


def _channels_last(module: nn.Module) -> bool:
    """Not so for the LayerNorms over axis 1 that convolutional models write for themselves."""
    return getattr(module, "data_format", None) != "channels_first" and "2d" not in type(module).__name__


def convert_norm_to_dyt(model: nn.Module, alpha_init: Alpha = 0.5) -> nn.Module:
    """Replaces LayerNorms and RMSNorms by `narrowgauge.nn.DyT`; in place, and returns the model.

    Args:
        model: Any model. It computes something else afterwards: this is a start for training, not a rewrite.
        alpha_init: Initial alpha: one number for all (default 0.5, that of the vision models); or a mapping from name
            patterns (``"*.input_layernorm"``) to numbers, of which the first that matches counts; or a function of name
            and module. A norm without a match, or for which the function gives None, stays.

    The new layers start with weights of one and, where the norm had a bias, biases of zero. Language models learn best
    with values of alpha that depend on width and position, see the documentation, and with embeddings multiplied by a
    learned scalar that starts at the root of the width, which is the model's own to add.

    Raises:
        TypeError: alpha_init is none of these.
        ValueError: Nothing was to be replaced, or the model itself is a norm.

    Source: arXiv 2503.10622.
    """
    if isinstance(alpha_init, (int, float)):
        alphas: Callable[[str, nn.Module], float | None] = lambda name, module: float(alpha_init)  # noqa: E731
    elif isinstance(alpha_init, Mapping):
        patterns = alpha_init.items()
        alphas = lambda name, module: next(  # noqa: E731
            (alpha for pattern, alpha in patterns if fnmatch.fnmatchcase(name, pattern)), None
        )
    elif callable(alpha_init):
        alphas = alpha_init
    else:
        raise TypeError(
            "convert_norm_to_dyt: alpha_init must be a number, a mapping from name patterns to numbers, or a function "
            f"of name and module; got {type(alpha_init).__name__}"
        )
    if _normalized_shape(model) is not None:
        raise ValueError(
            f"convert_norm_to_dyt: model is itself a {type(model).__name__}, which cannot be replaced in place; "
            "use narrowgauge.nn.DyT"
        )

    replacements: dict[nn.Module, DyT] = {}
    for name, module in model.named_modules():
        shape = _normalized_shape(module)
        alpha = None if shape is None else alphas(name, module)
        if shape is None or alpha is None:
            continue
        like = next(module.parameters(), next(model.parameters(), None))
        bias = module._parameters.get("bias") is not None
        layer = DyT(shape, alpha, bias, _channels_last(module)).train(module.training)
        replacements[module] = layer if like is None else layer.to(like.device, like.dtype)
    if not replacements:
        raise ValueError(
            "convert_norm_to_dyt: no LayerNorm or RMSNorm of the model was to be replaced; with a mapping or function "
            "as alpha_init, look at the names in model.named_modules()"
        )
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in replacements:
                parent._modules[key] = replacements[child]
    return model
