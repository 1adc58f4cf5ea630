"""Where the norms of a transformer stand: one wrapper for the residual schemes, so that they can be compared.

With a sub-layer F (attention or MLP), the stream x and the layer index l = 1, 2, ...:

    post   x <- norm_out(x + F(x))                     Post-LN
    pre    x <- x + F(norm_in(x))                      Pre-LN
    peri   x <- x + norm_out(F(norm_in(x)))            Peri-LN, arXiv 2502.02732
    lns    x <- x + F(norm_in(x) / sqrt(l))            LayerNorm Scaling, arXiv 2502.05795
    deep   x <- norm_out(c x + F(x))                   DeepNorm, arXiv 2203.00555

Mix-LN (arXiv 2412.13795) is post for the first layers and pre for the rest: `mix_ln_schemes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowgauge.norm.layer_norm import LayerNorm, add_layer_norm, layer_norm
from narrowgauge.norm.peri_add_norm import peri_add_norm
from narrowgauge.norm.rms_norm import RMSNorm, add_rms_norm, rms_norm
from narrowgauge.ops import checks
from narrowgauge.ops.system import system

Scheme = Literal["pre", "post", "peri", "lns", "deep"]
SCHEMES: tuple[Scheme, ...] = ("pre", "post", "peri", "lns", "deep")


def mix_ln_schemes(num_layers: int, alpha: float = 0.25) -> list[str]:
    """The scheme of each layer of a Mix-LN model: ``"post"`` for the first ``int(alpha * num_layers)``, then ``"pre"``.

    Args:
        num_layers: Number of layers.
        alpha: Share of Post-LN layers, from 0 (a Pre-LN model) to 1 (Post-LN). Default 0.25, that of the paper.

    Source: arXiv 2412.13795.
    """
    if not isinstance(num_layers, int) or num_layers < 0:
        raise ValueError(f"mix_ln_schemes: num_layers must be an integer >= 0, got {num_layers!r}")
    if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"mix_ln_schemes: alpha must be between 0 and 1, got {alpha!r}")
    posts = int(alpha * num_layers)
    return ["post"] * posts + ["pre"] * (num_layers - posts)


class ResidualNorm(nn.Module):
    """A residual connection with its norms, around a sub-layer that is passed to `forward`.

    Args:
        dim: Width of the stream.
        scheme: ``"pre"``, ``"post"``, ``"peri"``, ``"lns"`` (LayerNorm Scaling) or ``"deep"`` (DeepNorm).
        norm: ``"rms"`` (default) or ``"layer"``, with a bias.
        layer_index: Number of the layer, counted from 1; ``"lns"`` needs it, the other schemes do not look at it. Both
            sub-layers of a layer have the same.
        eps: Added to the mean square or variance. Default 1e-6.
        residual_scale: The factor c of ``"deep"``, which needs it; ``(2 * num_layers) ** 0.25`` in a decoder.

    The parameters are in ``norm_in`` and ``norm_out``; the one that a scheme does not have is None. A model ends with
    an ordinary norm before its head, whatever the scheme, and ``"lns"`` does not scale that one.
    """

    norm_in: RMSNorm | LayerNorm | None
    norm_out: RMSNorm | LayerNorm | None

    def __init__(
        self,
        dim: int,
        scheme: Scheme | str = "pre",
        norm: Literal["rms", "layer"] | str = "rms",
        layer_index: int | None = None,
        eps: float = 1e-6,
        *,
        residual_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_choice("ResidualNorm", "scheme", scheme, SCHEMES)
        checks.check_choice("ResidualNorm", "norm", norm, ("rms", "layer"))
        if scheme == "lns" and layer_index is None:
            raise ValueError(
                "ResidualNorm: scheme 'lns' needs layer_index, the layer's number counted from 1"
            )
        if layer_index is not None and (not isinstance(layer_index, int) or layer_index < 1):
            raise ValueError(f"ResidualNorm: layer_index counts from 1, got {layer_index!r}")
        if (residual_scale is None) == (scheme == "deep"):
            raise ValueError(
                "ResidualNorm: residual_scale is needed by scheme 'deep', for example (2 * num_layers) ** 0.25, "
                f"and used by no other; got {residual_scale!r} with scheme {scheme!r}"
            )
        self.dim, self.scheme, self.norm, self.layer_index = dim, scheme, norm, layer_index
        self.eps, self.residual_scale = eps, residual_scale
        self.input_scale = 1 / math.sqrt(layer_index) if scheme == "lns" and layer_index is not None else 1.0
        kind = RMSNorm if norm == "rms" else LayerNorm
        for name, users in (("norm_in", ("pre", "lns", "peri")), ("norm_out", ("post", "deep", "peri"))):
            self.register_module(
                name, kind(dim, eps, device=device, dtype=dtype) if scheme in users else None
            )

    def normed_input(self, x: Tensor) -> Tensor:
        """What the sub-layer reads: the normed stream, or the stream itself where the scheme has no norm there."""
        if self.norm_in is None:
            return x
        if self.input_scale == 1.0:
            return self.norm_in(x)
        weight, bias = self._input_affine()
        if self.norm == "rms":
            return rms_norm(x, self.dim, weight, self.eps)
        return layer_norm(x, self.dim, weight, bias, self.eps)

    def _input_affine(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the norm before the sub-layer, with the factor of LayerNorm Scaling in them."""
        norm = self.norm_in
        assert norm is not None
        assert norm.weight is not None
        if self.input_scale == 1.0:
            return norm.weight, norm.bias
        return norm.weight * self.input_scale, None if norm.bias is None else norm.bias * self.input_scale

    def _added(self, x: Tensor, f: Tensor) -> Tensor:
        """The new stream of sub-layer output f."""
        out = self.norm_out
        if out is None:
            return x + f
        if self.scheme == "peri":
            return x + out(f)
        if self.residual_scale is not None:
            x = x * self.residual_scale
        add_norm: Callable[..., tuple[Tensor, Tensor]] = (
            add_rms_norm if self.norm == "rms" else add_layer_norm
        )
        return add_norm(f, x, out.weight, eps=self.eps, bias=out.bias)[0]

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """The stream after the sub-layer.

        Args:
            x: The stream, shape ``(..., dim)``.
            sublayer: Function of the normed stream (of the stream, in the schemes without ``norm_in``).
        """
        return self._added(x, sublayer(self.normed_input(x)))

    def junction(self, x: Tensor, f: Tensor, following: ResidualNorm) -> tuple[Tensor, Tensor]:
        """Adds the sub-layer's output and norms the sum for the next sub-layer, in one kernel where there is one.

        ``stream, y = block.junction(stream, f, following)`` is ``stream = x + f`` with this scheme's norms, and
        ``y = following.normed_input(stream)``. Fused are ``pre`` and ``lns`` before ``pre``, ``lns`` or ``peri``, and
        ``peri`` before the same with RMSNorm of one eps.

        Args:
            x: The stream before the sub-layer.
            f: The sub-layer's output.
            following: The residual norm of the next sub-layer.
        """
        same = following.norm_in is not None and (self.norm, self.eps) == (following.norm, following.eps)
        if same and self.norm_out is None:
            weight, bias = following._input_affine()
            add_norm: Any = add_rms_norm if self.norm == "rms" else add_layer_norm
            y, stream = add_norm(f, x, weight, eps=self.eps, bias=bias)
            return stream, y
        if same and self.scheme == "peri" and self.norm == "rms":
            assert self.norm_out is not None
            y, stream = peri_add_norm(f, x, self.norm_out.weight, following._input_affine()[0], self.eps)
            return stream, y
        stream = self._added(x, f)
        return stream, following.normed_input(stream)

    def extra_repr(self) -> str:
        scale = "" if self.residual_scale is None else f", residual_scale={self.residual_scale:.6g}"
        return (
            f"{self.dim}, scheme={self.scheme!r}, norm={self.norm!r}, layer_index={self.layer_index}, "
            f"eps={self.eps}{scale}"
        )


system(
    "placement",
    title="Norm placement: Post-LN, Pre-LN, Mix-LN, Peri-LN, LayerNorm Scaling, DeepNorm",
    source="arXiv 2412.13795, 2502.02732, 2502.05795",
    page="norm/placement.md",
    functions=("peri_add_norm", "convert.apply_layernorm_scaling", "nn.mix_ln_schemes"),
    modules=("ResidualNorm",),
    operators=("peri_add_norm", "peri_add_norm_forward", "peri_add_norm_backward"),
    golden=("placement",),
    bench=("peri_add_norm",),
)
