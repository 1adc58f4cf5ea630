"""SAM (Foret et al., arXiv 2010.01412) and ASAM (Kwon et al., arXiv 2102.11600): step with the gradient from uphill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import system
from narrowgauge.optim import codec, tensors
from narrowgauge.optim.base import check_range
from narrowgauge.optim.elementwise import Rule, stream_seed
from narrowgauge.optim.rule_samples import PARAM_UPDATES


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    (factor,) = scalars
    if variant == 1:
        g = p * p * g
    return torch.where(factor != 0, p + factor * g, p), [p.clone()]  # p may be what the step writes


def _terms(variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: Any) -> list[Tensor]:
    if variant == 1:
        g = p * g
    return [g * g]


# Variant 1: adaptive. The state takes the parameter from before the climb.
sam_rule = Rule(
    name="sam",
    options=(),
    signed=((True,), (True,)),
    scalars=lambda variant, lr, step, given: (given[0],),
    update=_update,
    terms=_terms,
    sums=(1, 1),
    given=(1, 1),
)


class _Batch:
    """Parameters that one call takes: their shards, the gradients', and where the old values go."""

    def __init__(
        self, whole: list[Tensor], grads: list[Tensor], indices: list[int], rho: float, adaptive: bool
    ) -> None:
        self.whole, self.indices, self.rho, self.variant = whole, indices, rho, int(adaptive)
        self.shards = [tensors.local(p) for p in whole]
        self.params = [
            shard if shard.is_contiguous() or tensors.is_dense(shard) else shard.contiguous()
            for shard in self.shards
        ]
        self.grads = [tensors.like(tensors.local(g), p) for g, p in zip(grads, self.params, strict=True)]
        dtype, grad_dtype = self.params[0].dtype, self.grads[0].dtype
        if grad_dtype not in (dtype, torch.float32, torch.bfloat16) or dtype is torch.float64:
            self.grads = [g.to(dtype) for g in self.grads]
        # bfloat16 parameters are kept as they are; the rule computes float16 ones, too, in float32.
        kept = torch.float32 if dtype is torch.float16 else dtype
        self.format = codec.FORMATS["bf16" if dtype is torch.bfloat16 else "fp32"].number
        self.old = [torch.empty_like(p, dtype=kept) for p in self.params]
        self.steps = list(torch.zeros(len(whole), device=self.params[0].device).unbind())

    def _arguments(self) -> tuple[Any, ...]:
        return self.params, self.grads, self.old, [], self.steps

    def squared_norm(self, grad_scale: Tensor | None) -> Tensor:
        unused = torch.zeros((len(self.params), 1), dtype=torch.float64, device=self.params[0].device)
        sums = sam_rule.reduce(
            *(*self._arguments(), unused, None, 0.0, [], self.variant, self.format, 0, [], False, []),
            *(grad_scale, None),
        )
        return tensors.sum_over_shards(sums.double().sum(), self.whole[0])

    def climb(self, norm: Tensor, grad_scale: Tensor | None, seed: int) -> None:
        """Keeps the values and moves by rho along the gradient; by nothing where `norm` is not finite."""
        factor = torch.where(norm.isfinite(), self.rho / (norm + 1e-12), 0.0).to(self.params[0].device)
        given = factor.expand(len(self.params), 1).contiguous()
        stochastic = self.params[0].dtype is torch.bfloat16
        sam_rule.step(
            *(*self._arguments(), [], [], [], given, None, None, 0.0, [], self.variant, self.format),
            *(PARAM_UPDATES.index("stochastic" if stochastic else "nearest"), False, False, 0.0, [], seed),
            self.indices if stochastic else [],
            [tensors.first_element(p) for p in self.whole] if stochastic else [],
            *(grad_scale, None, None),
        )
        for shard, p in zip(self.shards, self.params, strict=True):
            if p is not shard:
                shard.copy_(p)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(self.whole)


def _batches(entries: Iterable[tuple[int, Tensor, Tensor, float, bool]]) -> list[_Batch]:
    """Parameters, with their number, gradient, rho and adaptive, by what one call takes."""
    lists: dict[Any, tuple[list[Tensor], list[Tensor], list[int]]] = {}
    for index, p, g, rho, adaptive in entries:
        if g.layout is not torch.strided:
            raise RuntimeError("SAM does not support sparse gradients; build the layer with sparse=False")
        key = (rho, adaptive, p.dtype, g.dtype, p.device, tensors.sharding(p))
        params, grads, indices = lists.setdefault(key, ([], [], []))
        params.append(p)
        grads.append(g)
        indices.append(index)
    return [_Batch(*values, *key[:2]) for key, values in lists.items()]


def _climb(batches: list[_Batch], grad_scale: Tensor | None, seed: int) -> Tensor:
    """Perturbs all; returns the norm of all weighted gradients, in float64."""
    device = batches[0].params[0].device
    norm = torch.stack([batch.squared_norm(grad_scale).to(device) for batch in batches]).sum().sqrt()
    for batch in batches:
        batch.climb(norm, grad_scale, seed)
    return norm


@torch.no_grad()
def sam_perturb_(
    params: Sequence[Tensor], grads: Sequence[Tensor], rho: float, adaptive: bool = False
) -> list[Tensor]:
    """Moves parameters uphill by `rho` along their joint gradient: p + rho s^2 g / |s g|.

    Three launches for each dtype and device, and nothing waits for the device. Gradients that are not finite move
    nothing. bfloat16 parameters are rounded stochastically, because the move is often smaller than half their spacing;
    the draw takes its seed from torch's generator.

    Args:
        params: Floating-point or complex tensors of any shape, changed in place.
        grads: Their gradients.
        rho: How far to move.
        adaptive: Whether s is |p| (ASAM); otherwise it is 1.

    Returns:
        The values from before, for `sam_restore_`; of DTensors this process's shards.

    Raises:
        ValueError: The lists differ in length or shapes, or `rho` is negative.
    """
    check_range("sam_perturb_", "rho", rho, 0)
    if len(params) != len(grads):
        raise ValueError(f"sam_perturb_: {len(params)} params need as many grads, got {len(grads)}")
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if p.shape != g.shape:
            raise ValueError(
                f"sam_perturb_: grads[{i}] must have the shape {tuple(p.shape)} of its parameter, got {tuple(g.shape)}"
            )
    if not params:
        return []
    batches = _batches((i, p, g, rho, adaptive) for i, (p, g) in enumerate(zip(params, grads, strict=True)))
    narrow = any(batch.params[0].dtype is torch.bfloat16 for batch in batches)
    _climb(batches, None, int(torch.randint(2**62, ())) if narrow else 0)
    kept = {index: old for batch in batches for index, old in zip(batch.indices, batch.old, strict=True)}
    return [torch.view_as_complex(kept[i]) if p.is_complex() else kept[i] for i, p in enumerate(params)]


@torch.no_grad()
def sam_restore_(params: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    """Puts the values from before `sam_perturb_` back, bit for bit.

    Args:
        params: The tensors that were perturbed.
        old: What `sam_perturb_` returned.

    Raises:
        ValueError: The lists differ in length.
    """
    if len(params) != len(old):
        raise ValueError(f"sam_restore_: {len(params)} params need as many old values, got {len(old)}")
    if params:
        torch._foreach_copy_([tensors.local(p) for p in params], [tensors.local(x) for x in old])
        torch.autograd.graph.increment_version(params)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around any optimizer: two passes a step, the second a little uphill.

    `first_step` climbs by `rho` along the gradient of all parameters together; `second_step` goes back and steps the
    inner optimizer with the gradient from up there. `step` does both with a closure. Groups, states and checkpoints are
    those of the inner optimizer; a group may have a ``sam_rho`` and ``sam_adaptive`` of its own. The values from before
    the climb are kept outside the states, between the two passes only, and put back bit for bit.

    When the first gradient is not finite the whole step is skipped, without waiting for the device where the inner
    optimizer knows ``found_inf`` (those of this package and torch's fused ones).

    Args:
        base_optimizer: The optimizer that steps.
        rho: How far to climb.
        adaptive: Weight gradients with |p| (ASAM; rho is then about ten times larger).
        every: Climb only at every so many-th step; the others are the inner optimizer's alone.

    Raises:
        TypeError: `base_optimizer` is no optimizer.
        ValueError: Another argument is out of range.
    """

    def __init__(
        self, base_optimizer: torch.optim.Optimizer, rho: float = 0.05, adaptive: bool = False, every: int = 1
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"SAM: base_optimizer must be an optimizer, such as AdamW(params), got {base_optimizer!r}"
            )
        check_range("SAM", "rho", rho, 0)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"SAM: every must be a whole number >= 1, got {every!r}")
        self.base_optimizer, self.every = base_optimizer, every
        self._climbed: list[_Batch] = []
        self._norm: Tensor | None = None
        super().__init__(
            base_optimizer.param_groups, {"sam_rho": rho, "sam_adaptive": adaptive, "sam_step": 0}
        )
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def __getstate__(self) -> dict[str, Any]:
        own = {"base_optimizer": self.base_optimizer, "every": self.every}
        return {**super().__getstate__(), **own, "_climbed": self._climbed, "_norm": self._norm}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self.base_optimizer, "_step_supports_amp_scaling", False))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if any(param_group is group for group in self.base_optimizer.param_groups):
            super().add_param_group(param_group)  # at construction
        else:
            self.base_optimizer.add_param_group({**self.defaults, **param_group})

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)
        self._share()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> bool:
        """Climbs.

        Args:
            zero_grad: Drop the gradients afterwards.

        Returns:
            Whether a second pass is needed: not at steps that `every` leaves out.
        """
        if self._climbed:
            raise RuntimeError("SAM.first_step: the parameters are uphill already; call second_step first")
        step = self.param_groups[0]["sam_step"]
        if step % self.every:
            return False
        entries = ((p, group) for group in self.param_groups for p in group["params"])
        self._climbed = _batches(
            (i, p, p.grad, group["sam_rho"], group["sam_adaptive"])
            for i, (p, group) in enumerate(entries)
            if p.grad is not None
        )
        if self._climbed:
            seed = stream_seed(self.param_groups[0].get("seed", 0), -2 - step)
            self._norm = _climb(self._climbed, getattr(self, "grad_scale", None), seed)
        if zero_grad:
            self.zero_grad()
        return True

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False, **arguments: Any) -> None:
        """Goes back and takes the step.

        Args:
            zero_grad: Drop the gradients afterwards.
            **arguments: For the inner optimizer's ``step``.
        """
        base = self.base_optimizer
        flags = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        for batch in self._climbed:
            sam_restore_(batch.whole, batch.old)
        skip = None if self._norm is None else (~self._norm.isfinite()).float()
        self._climbed, self._norm = [], None
        for group in self.param_groups:
            group["sam_step"] += 1
        if skip is not None and self._step_supports_amp_scaling:
            found = flags.get("found_inf")
            flags["found_inf"] = (
                skip if found is None else torch.maximum(skip, found.to(skip.device).reshape(()))
            )
        elif skip is not None and skip.item() != 0:
            return
        before = {name: vars(base).get(name) for name in flags}
        vars(base).update(flags)
        try:
            base.step(**arguments)
        finally:
            for name, value in before.items():
                vars(base).pop(name)
                if value is not None:
                    setattr(base, name, value)
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None, **arguments: Any) -> Any:
        """Performs one step.

        Args:
            closure: Computes the loss and its gradients, and returns the loss. It is called uphill; the first gradients
                are those that the parameters hold, and when they hold none it computes these, too. Without it this is
                `second_step`.
            **arguments: For the inner optimizer's ``step``.

        Returns:
            What `closure` returned last.
        """
        if closure is None:
            if not self._climbed and self.param_groups[0]["sam_step"] % self.every == 0:
                raise RuntimeError("SAM.step needs a closure, or first_step and a second pass before it")
            self.second_step(**arguments)
            return None
        loss = None
        with torch.enable_grad():
            if all(p.grad is None for group in self.param_groups for p in group["params"]):
                loss = closure()
            if self.first_step(zero_grad=True):
                loss = closure()
        self.second_step(**arguments)
        return loss


system(
    "sam",
    title="SAM and ASAM",
    source="arXiv 2010.01412, arXiv 2102.11600",
    page="optim/sam.md",
    functions=("optim.sam_perturb_", "optim.sam_restore_"),
    modules=("optim.SAM",),
    operators=("sam_", "sam_sums"),
    golden=("sam",),
    bench=("sam",),
)
