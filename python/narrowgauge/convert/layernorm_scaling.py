"""LayerNorm Scaling (arXiv 2502.05795) for an existing Pre-LN model: the norms of layer l are scaled by 1 / sqrt(l)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from narrowgauge.norm import RMSNorm
from narrowgauge.swap import swap

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
)  # before attention and before the MLP of a Pre-LN layer
OF_OTHER_SCHEMES = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


class _OutputScale:
    """A forward hook for norms without an output scale of their own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.factor


def _layers(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """Name, index from 0 and module of every layer in a list called ``layers``."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "layers" and isinstance(module, (nn.ModuleList, nn.Sequential)):
            for index, layer in enumerate(module):
                yield f"{name}.{index}", index, layer


def _scale_of(norm: nn.Module) -> float:
    for hook in norm._forward_hooks.values():
        if isinstance(hook, _OutputScale):
            return hook.factor
    return float(getattr(norm, "output_scale", 1.0))


def apply_layernorm_scaling(model: nn.Module) -> nn.Module:
    """Scales the norms of layer i, counted from 0, by ``1 / sqrt(i + 1)``; in place, and returns the model.

    These are ``layers.{i}.input_layernorm`` and ``layers.{i}.post_attention_layernorm``, wherever in the model
    ``layers`` is. RMSNorms become `narrowgauge.nn.RMSNorm`, with their parameters and an ``output_scale``; the output
    of any other norm is multiplied. No weight changes, so that weight decay and learning rate act as they did; the
    final norm stays as it is. The method is for training: a trained model computes something else afterwards.

    Args:
        model: A Pre-LN model whose layers have these names, such as a LLaMA of Transformers.

    Raises:
        ValueError: There are no such layers; a layer is Post-LN or Peri-LN, where the names stand at other places; a
            norm is scaled by another factor already, or is that of two layers. A model that this function
            has scaled before is left as it is.

    Source: arXiv 2502.05795.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"apply_layernorm_scaling: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    factors: dict[str, float] = {}
    places: dict[nn.Module, tuple[str, float]] = {}
    for layer_name, index, layer in _layers(model):
        if not any(hasattr(layer, name) for name in (*NORMS, *OF_OTHER_SCHEMES)):
            continue
        other = [name for name in OF_OTHER_SCHEMES if hasattr(layer, name)]
        if other or not all(isinstance(getattr(layer, name, None), nn.Module) for name in NORMS):
            why = f"has {other[0]}" if other else f"lacks {' or '.join(NORMS)}"
            raise ValueError(
                f"apply_layernorm_scaling: {layer_name} {why}, so it is not a Pre-LN layer; LayerNorm Scaling is "
                "defined for Pre-LN only"
            )
        for name in NORMS:
            factor, norm = 1 / math.sqrt(index + 1), getattr(layer, name)
            place, other_factor = places.setdefault(norm, (f"{layer_name}.{name}", factor))
            if other_factor != factor:
                raise ValueError(
                    f"apply_layernorm_scaling: {layer_name}.{name} is the same module as {place}; "
                    "every layer needs norms of its own"
                )
            scale = _scale_of(norm)
            if scale not in (1.0, factor):
                raise ValueError(
                    f"apply_layernorm_scaling: {layer_name}.{name} is scaled by {scale} already, not by {factor}; "
                    "set its output_scale to 1 first"
                )
            if scale != factor:
                factors[f"{layer_name}.{name}"] = factor
    if not any(True for _, _, layer in _layers(model) if hasattr(layer, NORMS[0])):
        raise ValueError(
            "apply_layernorm_scaling: the model has no layers.{i}.input_layernorm; expected the names of a LLaMA of "
            "Transformers. In a model of your own use narrowgauge.nn.ResidualNorm(..., 'lns', layer_index=i + 1)"
        )
    swap(model, filter=lambda name, module: name in factors and not isinstance(module, nn.LayerNorm))
    for name, factor in factors.items():
        norm = model.get_submodule(name)
        if isinstance(norm, RMSNorm):
            norm.output_scale = factor
        else:
            norm.register_forward_hook(_OutputScale(factor))
    return model
