"""LayerNorm removal (Baroni et al., arXiv 2507.02559; Heimersheim, arXiv 2409.13710).

Fine-tuning freezes the standard deviation of one LayerNorm after the other to a constant,

    y = (x - mean) / sigma * weight + bias,

which is affine in x, so that `narrowgauge.convert.fold_fixed_layernorm` can merge it into the next linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowgauge.norm import _arguments, _reference
from narrowgauge.norm._arguments import packed
from narrowgauge.norm._reference import compute_dtype
from narrowgauge.norm._replacement import ReplacedNorm, norm_replacement
from narrowgauge.norm.layer_norm import layer_norm_backward_op, layer_norm_forward_op
from narrowgauge.ops import Sample, SampleMaker, checks, operator, system
from narrowgauge.ops.autograd import fused_function

Strings = Sequence[str | Sequence[str]]


def _scale_samples(make: SampleMaker) -> Iterator[Sample]:
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    for shape, why in _reference.SHAPES:
        yield Sample((make(*shape), make(*shape[:-1], dtype=wide), make(shape[-1]), None, 1e-5), why)
    scale = make(6, dtype=wide)
    yield Sample((make(6, 40), scale, make(40), make(40, dtype=wide), 1e-5), "weight and wide bias")
    yield Sample((make(6, 40), scale, None, None, 1e-5), "no weight")


def _backward_samples(make: SampleMaker) -> Iterator[Sample]:
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32

    def call(*shape: int, weight: bool = True, bias: bool = True, affine: bool = True) -> tuple[object, ...]:
        x, scale = make(*shape), make(*shape[:-1], dtype=wide)
        parameters = [make(shape[-1]) if wanted else None for wanted in (weight, bias)]
        return (make(*shape), x, x.to(wide).mean(-1), scale, *parameters, affine)

    for shape, why in _reference.SHAPES:
        yield Sample(call(*shape), why)
    yield Sample(call(6, 40, weight=False, bias=False), "no weight")
    yield Sample(call(6, 40, affine=False), "frozen weight")


def _row_samples(make: SampleMaker) -> Iterator[Sample]:
    for shape, why in _reference.SHAPES:
        yield Sample((make(*shape), 1e-5), why)


@operator(
    "scaled_layer_norm(Tensor x, Tensor scale, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    samples=_scale_samples,
)
def scaled_layer_norm_op(
    x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm with a given factor per row in place of rstd; also the mean and rstd that the row has."""
    _, s, mean, rstd = _reference.forward(x, None, None, None, eps, 0.0, None, centred=True)
    y = (s - mean.unsqueeze(-1)) * scale.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).contiguous(), mean, rstd


@operator(
    "scaled_layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor scale, Tensor? weight, Tensor? bias,"
    " bool affine_gradients) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    samples=_backward_samples,
)
def scaled_layer_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    affine_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients in one pass over dy and x: dx = scale * (h - mean(h)) with h = dy * weight."""
    _, dweight, dbias = _reference.backward(dy, x, mean, scale, weight, bias, None, 0.0, affine_gradients)
    h = dy.to(scale.dtype)
    if weight is not None:
        h = h * weight.to(scale.dtype)
    dx = (h - h.mean(-1, keepdim=True)) * scale.unsqueeze(-1)
    return dx.to(x.dtype).contiguous(), dweight, dbias


@operator("row_statistics(Tensor x, float eps) -> (Tensor mean, Tensor rstd)", samples=_row_samples)
def row_statistics_op(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean, and 1 / sqrt(variance + eps), of each row."""
    _, _, mean, rstd = _reference.forward(x, None, None, None, eps, 0.0, None, centred=True)
    return mean.clone(), rstd


def _real_setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    x, weight, bias, *_ = args
    y, mean, rstd = results
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(rstd)
    return y, rstd


def _real_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    _, for_weight, for_bias, *_ = ctx.needs_input_grad
    dx, dweight, dbias = layer_norm_backward_op(
        dy.contiguous(), x, mean, rstd, weight, bias, None, 0.0, for_weight or for_bias
    )
    return dx, dweight if for_weight else None, dbias if for_bias else None, None, None, None


def _fixed_setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    x, scale, weight, bias, _ = args
    y, mean, rstd = results
    ctx.save_for_backward(x, scale, weight, bias, mean)
    ctx.mark_non_differentiable(rstd)
    return y, rstd


def _fixed_gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, weight, bias, mean = ctx.saved_tensors
    _, _, for_weight, for_bias, _ = ctx.needs_input_grad
    dx, dweight, dbias = scaled_layer_norm_backward_op(
        dy.contiguous(), x, mean, scale, weight, bias, for_weight or for_bias
    )
    return dx, None, dweight if for_weight else None, dbias if for_bias else None, None


def _std_setup(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> Tensor:
    x, ctx.eps = args
    _, rstd = results
    ctx.save_for_backward(x, rstd)
    return rstd.reciprocal()


def _std_gradients(ctx: Any, dstd: Tensor) -> tuple[Tensor, None]:
    # d sigma / d x = (x - mean) / (d * sigma): a row that is centred and scaled.
    x, rstd = ctx.saved_tensors
    scale = (dstd * rstd / x.shape[-1]).contiguous()
    return scaled_layer_norm_op(x, scale, None, None, ctx.eps)[0], None


_real = fused_function("fixed_std_layer_norm", layer_norm_forward_op, _real_setup, _real_gradients)
_fixed = fused_function("fixed_std_layer_norm", scaled_layer_norm_op, _fixed_setup, _fixed_gradients)
_row_std = fused_function("residual_std_loss", row_statistics_op, _std_setup, _std_gradients)


def _check_mask(function: str, name: str, x: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{function}: {name} must be a boolean tensor, got {given}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"{function}: {name} has shape {tuple(mask.shape)}; expected one entry per token, {tuple(x.shape[:-1])}"
        )
    checks.check_same_device(function, "x", x, **{name: mask})


def residual_std_loss(
    x: Tensor,
    mask: Tensor | None = None,
    weight: float = 0.1,
    eps: float = 1e-5,
    *,
    pad_mask: Tensor | None = None,
) -> Tensor:
    """Auxiliary loss that makes the standard deviations of all tokens alike: ``weight * mean((sigma - target)^2)``.

    Args:
        x: Input of the final norm, shape ``(..., d)``; float32, bfloat16, float16 or float64.
        mask: Boolean, one entry per token; true where the token counts in the target: those that are neither the first
            nor an end of text. Default: all. At least one must be true, or the loss is NaN.
        weight: Factor of the loss; the paper has 0.1 for GPT-2 small and medium, 0.03 for large, 0.01 for XL.
            Default 0.1.
        eps: Added to the biased variance in ``sigma``. Default 1e-5.
        pad_mask: Boolean, one entry per token; true for padding, which then counts nowhere. Default: no padding.

    Returns:
        A scalar in float32 (float64 for float64). ``target``, the mean sigma of the tokens in `mask`, is a constant for
        the gradient, which is exact.

    Source: arXiv 2507.02559.
    """
    name = "residual_std_loss"
    _arguments.last_size(name, x)
    checks.check_floating(name, x=x)
    checks.check_eps(name, eps)
    _check_mask(name, "mask", x, mask)
    _check_mask(name, "pad_mask", x, pad_mask)
    sigma: Tensor = _row_std.apply(x.contiguous(), eps)
    valid = None if pad_mask is None else ~pad_mask
    if valid is not None:
        mask = valid if mask is None else mask & valid
    with torch.no_grad():
        target = sigma.mean() if mask is None else torch.where(mask, sigma, 0).sum() / mask.sum()
    squares = (sigma - target).square()
    if valid is None:
        return weight * squares.mean()
    return weight * torch.where(valid, squares, 0).sum() / valid.sum()


class FixedStdLayerNorm(nn.Module):
    """LayerNorm whose standard deviation can be frozen to a constant, after which it is affine in its input.

    Args:
        dim: Width of the rows.
        eps: Added to the biased variance. Default 1e-5.
        decay: Weight of the old value in the running mean: ``running = decay * running + (1 - decay) * batch``.
            Default 0.9.
        init_std: Where the running value starts. Default None: with the first batch's.
        special_first: Give position 0 a constant of its own. Default False.
        init_first_std: As `init_std`, for position 0. Default None.
        exclude_first: With `special_first`, leave position 0 out of the running mean. Default True.
        follow: Let the constant follow the running value while fixed. Default False.
        bias: Learn a bias. Default True.
        process_group: Average over the ranks of this group. Default None: no communication.

    Input ``(..., positions, dim)``. The running values are updated by every call of `forward`, in training and
    evaluation, before and after `freeze`. Buffers: ``running_std``, ``running_first_std`` (of all positions without
    `special_first`), and ``fixed_std``, the frozen
    constants (first, others), NaN before. Source: arXiv 2507.02559.
    """

    running_std: Tensor
    running_first_std: Tensor
    fixed_std: Tensor

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        decay: float = 0.9,
        init_std: float | None = None,
        special_first: bool = False,
        *,
        init_first_std: float | None = None,
        exclude_first: bool = True,
        follow: bool = False,
        bias: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_eps("FixedStdLayerNorm", eps)
        if not 0 <= decay <= 1:
            raise ValueError(f"FixedStdLayerNorm: decay must be between 0 and 1, got {decay!r}")
        for name, value in (("init_std", init_std), ("init_first_std", init_first_std)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"FixedStdLayerNorm: {name} must be a finite number > 0, got {value!r}")
        self.normalized_shape = _arguments.as_sizes(dim)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"FixedStdLayerNorm: dim must be one integer, got {dim!r}")
        self.eps, self.decay, self.special_first = eps, decay, special_first
        self.exclude_first, self.follow, self.process_group = exclude_first, follow, process_group
        self.frozen = False
        _arguments.register_affine(
            self, self.normalized_shape, weight=True, bias=bias, device=device, dtype=dtype
        )
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        unknown = float("nan")
        starts = (init_std, init_first_std, (unknown, unknown))
        for name, start in zip(("running_std", "running_first_std", "fixed_std"), starts, strict=True):
            start = unknown if start is None else start
            self.register_buffer(name, torch.tensor(start, device=device, dtype=statistics))
        self.reset_parameters()

    weight: Tensor
    bias: Tensor | None

    def reset_parameters(self) -> None:
        """Sets the weight to one and the bias to zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def std(self) -> Tensor:
        """The constant in use (before freezing the running value); with `special_first` the pair (first, others)."""
        pair = self.fixed_std
        if not self.frozen or self.follow:
            pair = torch.stack((self.running_first_std, self.running_std))
        return pair.clone() if self.special_first else pair[1].clone()

    @torch.no_grad()
    def freeze(self) -> None:
        """Fixes the standard deviation to the running value as it is now."""
        running = torch.stack((self.running_first_std, self.running_std))
        if not bool(running[0 if self.special_first else 1 :].isfinite().all()):
            raise RuntimeError(
                f"FixedStdLayerNorm.freeze: the running value is {self.running_std.item()}; run a batch first, "
                "or give init_std"
            )
        if not self.frozen:
            self.fixed_std.copy_(running)
        self.frozen = True

    @torch.no_grad()
    def drop_special_first(self) -> None:
        """Ends the special treatment of position 0, which from here on takes the constant of the others."""
        self.special_first = False
        self.fixed_std[0] = self.fixed_std[1]

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalizes x; `pad_mask` (one entry per token, true for padding) keeps padding out of the running mean."""
        name = "FixedStdLayerNorm"
        sizes = _arguments.normalized_sizes(name, x, self.normalized_shape)
        _arguments.check(name, x, sizes, self.weight, self.bias, self.eps, None)
        _check_mask(name, "pad_mask", x, pad_mask)
        if self.special_first and x.dim() < 2:
            raise ValueError(
                f"{name}: with special_first x needs a dimension of positions, got {tuple(x.shape)}"
            )
        x, weight, bias = x.contiguous(), packed(self.weight), packed(self.bias)
        if not self.frozen:
            y, rstd = _real.apply(x, weight, bias, self.eps, 0.0, None)
            self._track(rstd.detach(), pad_mask)
            return y
        if self.follow:
            self._track(row_statistics_op(x.detach(), self.eps)[1], pad_mask)
            return _fixed.apply(x, self._scale(x), weight, bias, self.eps)[0]
        y, rstd = _fixed.apply(x, self._scale(x), weight, bias, self.eps)
        self._track(rstd.detach(), pad_mask)
        return y

    @torch.no_grad()
    def _scale(self, x: Tensor) -> Tensor:
        """1 / sigma for every row."""
        std = self.fixed_std[1] if not (self.follow or self.special_first) else self.std
        scale = std.to(compute_dtype(x.dtype)).reciprocal()
        if not self.special_first:
            return scale.expand(x.shape[:-1]).contiguous()
        per_position = torch.where(torch.arange(x.shape[-2], device=x.device) == 0, scale[0], scale[1])
        return per_position.expand(x.shape[:-1]).contiguous()

    @torch.no_grad()
    def _track(self, rstd: Tensor, pad_mask: Tensor | None) -> None:
        """Takes the standard deviations of a batch into the running values."""
        sigma = rstd.reciprocal().to(self.running_std.dtype)
        if pad_mask is None and not self.special_first and self.process_group is None:
            if sigma.numel() > 0:
                batch = sigma.mean()
                for running in (self.running_std, self.running_first_std):
                    running.copy_(torch.where(running.isnan(), batch, batch.lerp(running, self.decay)))
            return
        if sigma.dim() == 0:
            sigma, pad_mask = sigma[None], None if pad_mask is None else pad_mask[None]
        kept = torch.ones_like(sigma, dtype=torch.bool) if pad_mask is None else ~pad_mask
        first = torch.zeros_like(kept)
        first[..., :1] = True
        general = kept & ~first if self.special_first and self.exclude_first else kept
        sums = torch.stack(
            [
                value
                for chosen in (general, kept & first if self.special_first else general)
                for value in (torch.where(chosen, sigma, 0).sum(), chosen.sum().to(sigma.dtype))
            ]
        )
        if self.process_group is not None:
            dist.all_reduce(sums, group=self.process_group)
        for running, total, count in (
            (self.running_std, sums[0], sums[1]),
            (self.running_first_std, sums[2], sums[3]),
        ):
            batch = total / count
            moved = torch.where(running.isnan(), batch, self.decay * running + (1 - self.decay) * batch)
            running.copy_(torch.where(count > 0, moved, running))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.frozen = bool(self.fixed_std[1].isfinite())

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, decay={self.decay}, special_first={self.special_first}, "
            f"bias={self.bias is not None}, frozen={self.frozen}"
        )


SPECIAL_FIRST = "special_first"


class LNRemovalSchedule:
    """Freezes the `FixedStdLayerNorm` layers of a model one after the other.

    Args:
        model: The model that is being fine-tuned.
        start: Step at which the first norm is frozen.
        gaps: For each group of `order`, how many steps pass after each of its entries.
        order: Groups in the order of removal. A group lists names of `FixedStdLayerNorm` modules; a tuple of names is
            frozen at one step. The group ``"special_first"`` ends the special treatment of position 0 in all layers.

    Call `step` once after each step of the optimizer. For GPT-2 small the paper freezes the second norms of all blocks,
    then the first, then the final one: ``start=20``, ``gaps=(2, 3, 2, 10)``, and last ``"special_first"``.
    Source: arXiv 2507.02559.
    """

    def __init__(
        self, model: nn.Module, start: int, gaps: Sequence[int], order: Sequence[str | Strings]
    ) -> None:
        if len(gaps) != len(order) or any(gap < 0 for gap in gaps) or start < 1:
            raise ValueError(
                f"LNRemovalSchedule: start must be >= 1, and gaps hold one number >= 0 for each of the {len(order)} "
                f"groups of order; got start={start}, gaps={list(gaps)}"
            )
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, FixedStdLayerNorm)}
        self.events: list[tuple[int, tuple[str, ...] | None]] = []
        self.last_step = 0
        step = start
        for group, gap in zip(order, gaps, strict=True):
            if isinstance(group, str) and group != SPECIAL_FIRST:
                raise ValueError(
                    f"LNRemovalSchedule: a group is a list of names or {SPECIAL_FIRST!r}, got {group!r}"
                )
            for entry in [None] if isinstance(group, str) else group:
                names = entry if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
                for name in names or ():
                    if name not in self.layers:
                        raise ValueError(
                            f"LNRemovalSchedule: order names {name!r}, which is no FixedStdLayerNorm of the model; "
                            f"it has {', '.join(self.layers) or 'none'}"
                        )
                self.events.append((step, names))
                step += gap

    def step(self) -> list[str]:
        """Counts one step; returns the names of the layers that changed at it."""
        self.last_step += 1
        changed = []
        for when, names in self.events:
            if when != self.last_step:
                continue
            for name in self.layers if names is None else names:
                if names is None:
                    self.layers[name].drop_special_first()
                else:
                    self.layers[name].freeze()
                changed.append(name)
        return changed

    @property
    def done(self) -> bool:
        """Whether nothing is left to change."""
        return all(when <= self.last_step for when, _ in self.events)

    def state_dict(self) -> dict[str, int]:
        """The number of steps taken; what is frozen is in the state of the model."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after ``state["last_step"]`` steps."""
        self.last_step = int(state["last_step"])
        for when, names in self.events:
            if names is None and when <= self.last_step:  # the state of the model does not tell
                for layer in self.layers.values():
                    layer.special_first = False


@norm_replacement("fixed_std")
def _in_place_of(norm: ReplacedNorm) -> FixedStdLayerNorm:
    norm.need_weight()
    return FixedStdLayerNorm(norm.width, norm.eps, bias=norm.bias, device=norm.device, dtype=norm.dtype)


system(
    "ln_removal",
    title="LayerNorm removal: fixed standard deviation, schedule, folding",
    source="arXiv 2507.02559",
    page="norm/ln_removal.md",
    functions=("residual_std_loss", "convert.fold_fixed_layernorm"),
    modules=("FixedStdLayerNorm", "LNRemovalSchedule"),
    operators=("scaled_layer_norm", "scaled_layer_norm_backward", "row_statistics"),
    golden=("ln_removal",),
    bench=("fixed_std_layer_norm", "residual_std_loss", "fold_fixed_layernorm"),
)
