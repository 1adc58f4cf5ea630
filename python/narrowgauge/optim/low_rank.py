"""Adam in a low-rank basis of each matrix gradient: projections, and what the optimizers built on them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narrowgauge.ops import checks
from narrowgauge.optim import codec
from narrowgauge.optim.adamw import AdamW
from narrowgauge.optim.base import _dtensor, check_range
from narrowgauge.optim.elementwise import stream_seed

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
PROJECTIONS = ("svd", "randomized", "subspace")
OVERSAMPLING, POWER_ITERATIONS = 8, 2

# --- projections --------------------------------------------------------------------------------------------


def sides(shape: Sequence[int], proj_type: str) -> tuple[str, ...]:
    """On which sides a matrix of this shape is projected: "left" acts on its rows, "right" on its columns."""
    if proj_type == "full":
        return ("left", "right")
    if proj_type in ("left", "right"):
        return (proj_type,)
    tall = shape[0] >= shape[1]
    return ("right",) if tall == (proj_type == "std") else ("left",)


def find_bases(
    g: Tensor,
    rank: int,
    where: Sequence[str],
    projection: str = "svd",
    old: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    """Orthonormal bases of the dominant part of the matrix `g`: (m, rank) on the left, (rank, n) on the right.

    Elements that are not finite count as zero here; the projected gradient still shows them.

    Args:
        g: Gradient, (m, n).
        rank: At most min(m, n).
        where: Sides, as `sides` gives them.
        projection: How the basis is found, one of `PROJECTIONS`.
        old: Bases to start from, for "subspace"; without them it starts like "randomized".
        generator: CPU generator of the random start.
    """
    g = torch.where(g.isfinite(), g, 0)
    if projection == "svd":
        # Singular vectors in float32 differ by 1e-5 between LAPACKs; in float64 every CPU gives the same float32 basis.
        wide = g.double() if g.device.type == "cpu" else g
        u, _, vh = torch.linalg.svd(wide, full_matrices=False)
        bases = {"left": u[:, :rank], "right": vh[:rank]}
        return tuple(bases[side].to(g.dtype).contiguous() for side in where)
    if g.numel():
        g = g / g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)
    found = []
    for number, side in enumerate(where):
        columns = g if side == "left" else g.T
        if projection == "subspace" and old is not None:
            basis = _power_iteration(columns, old[number] if side == "left" else old[number].T)
        else:
            basis = _range_finder(columns, rank, generator)
        found.append((basis if side == "left" else basis.T).contiguous())
    return tuple(found)


def _range_finder(a: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """Halko, Martinsson and Tropp, arXiv 0909.4061: the range of a times random vectors, then the best of it."""
    count = min(rank + OVERSAMPLING, *a.shape)
    start = torch.randn(a.shape[1], count, generator=generator, dtype=a.dtype).to(a.device)
    q = torch.linalg.qr(a @ start).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(a @ torch.linalg.qr(a.T @ q).Q).Q
    small = q.T @ a
    vectors = torch.linalg.eigh(small @ small.T).eigenvectors.flip(1)
    return q @ vectors[:, :rank]


def _power_iteration(a: Tensor, basis: Tensor) -> Tensor:
    for _ in range(POWER_ITERATIONS):
        basis, triangle = torch.linalg.qr(a @ (a.T @ basis))
        # Signs as in the basis before: the moments are kept when it changes.
        basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return basis


def project(g: Tensor, where: Sequence[str], bases: Sequence[Tensor]) -> Tensor:
    """The coordinates of `g` in the bases; `g` itself without any."""
    for side, basis in zip(where, bases, strict=True):
        g = basis.T @ g if side == "left" else g @ basis.T
    return g


def factors(low: Tensor, where: Sequence[str], bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two matrices whose product has the coordinates `low`."""
    if len(bases) == 2:
        return bases[0] @ low, bases[1]
    return (bases[0], low) if where[0] == "left" else (low, bases[0])


def project_back(low: Tensor, where: Sequence[str], bases: Sequence[Tensor]) -> Tensor:
    """The matrix in the span of the bases that has the coordinates `low`."""
    return torch.mm(*factors(low, where, bases)) if bases else low


# --- the Adam step ------------------------------------------------------------------------------------------


def adam_updates(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Moments in place, and what to subtract: lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps).

    `steps` count this step already. eps is outside the bias correction, as in the code of GaLore's authors.
    """
    beta1, beta2 = betas
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, grads, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, eps)
    updates = list(torch._foreach_div(exp_avgs, denominators))
    t = torch.stack(steps).double()
    sizes = (1 - beta2**t).sqrt() / (1 - beta1**t) * lr
    for update, size in zip(updates, sizes.unbind(), strict=True):
        update.mul_(size)
    return updates


def _encode(x: Tensor, *, signed: bool) -> dict[str, Tensor]:
    codes, scale = codec.encode_state(x, "int8", signed=signed)
    return {"codes": codes, "scale": scale}


def _decode(encoded: dict[str, Tensor], *, signed: bool) -> Tensor:
    return codec.decode_state(encoded["codes"], encoded["scale"], "int8", signed=signed)


# --- what the optimizers share ------------------------------------------------------------------------------


class LowRankOptimizer(AdamW):
    """Base of the optimizers that keep their moments in a basis of the gradient.

    A subclass defines `_moment_shapes` and `_low_rank_step`, and says which groups take that step in `_is_own`; the
    others are `AdamW`.
    """

    _until_look: dict[Tensor, int]

    # --- what a subclass defines ---

    def _is_own(self, group: dict[str, Any]) -> bool:
        return group["rank"] is not None

    def _moment_shapes(self, group: dict[str, Any], p: Tensor) -> dict[str, tuple[int, ...]]:
        """The moments by name; those with the shape of the projected gradient may be stored in 8 bits."""
        low = self._low_shape(group, p)
        return {"exp_avg": low, "exp_avg_sq": low}

    def _low_rank_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        lr: float | Tensor,
        grad_scale: Tensor | None,
        skipped: Tensor | None,
    ) -> None:
        """A step over parameters of one device and dtype; `skipped` is a flag on that device."""
        raise NotImplementedError

    # --- groups ---

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        name, rank = type(self).__name__, group["rank"]
        if rank is not None:
            _check_count(name, "rank", rank, " or None")
        _check_count(name, "update_proj_gap", group["update_proj_gap"])
        check_range(name, "scale", group["scale"], 0)
        checks.check_choice(name, "proj_type", group["proj_type"], PROJ_TYPES)
        checks.check_choice(name, "projection", group["projection"], PROJECTIONS)
        if self._is_own(group):
            for option, value in (("amsgrad", False), ("param_update", "nearest")):
                if group[option] != value:
                    raise ValueError(
                        f"{name}: {option} must be {value!r} in a group with low-rank states, got {group[option]!r}"
                    )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            params = param_group["params"]
            param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
            for p in params:
                tensor = p[1] if isinstance(p, tuple) else p
                if isinstance(tensor, Tensor) and self._is_own(options):
                    self._check_param(options, tensor)
        super().add_param_group(param_group)

    def _check_param(self, group: dict[str, Any], p: Tensor) -> None:
        name, dtensor = type(self).__name__, _dtensor()
        if p.is_complex():
            raise ValueError(f"{name}: a parameter has dtype {p.dtype}; low-rank states are for real ones")
        if dtensor is not None and isinstance(p, dtensor):
            raise ValueError(
                f"{name}: a parameter is sharded (DTensor), but its basis needs the whole gradient; "
                "put it into a group with rank=None, or of narrowgauge.optim.AdamW"
            )
        if group["rank"] is not None and p.dim() < 2:
            raise ValueError(
                f"{name}: a parameter of shape {tuple(p.shape)} is no matrix; put it into a group with rank=None"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._until_look = {}

    # --- states ---

    def _low_shape(self, group: dict[str, Any], p: Tensor) -> tuple[int, ...]:
        rows, columns = matrix_shape(p)
        if group["rank"] is None:
            return rows, columns
        rank, where = min(group["rank"], rows, columns), sides((rows, columns), group["proj_type"])
        return rank if "left" in where else rows, rank if "right" in where else columns

    def _projection_shapes(self, group: dict[str, Any], p: Tensor) -> dict[str, tuple[int, ...]]:
        if group["rank"] is None:
            return {}
        rows, columns = matrix_shape(p)
        rank, where = min(group["rank"], rows, columns), sides((rows, columns), group["proj_type"])
        shapes = {"left": (rows, rank), "right": (rank, columns)}
        return {"projection" if len(where) == 1 else f"projection_{side}": shapes[side] for side in where}

    def _layout(self, group: dict[str, Any], p: Tensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The keys of the state of a parameter with low-rank states, without `step`: dtype and shape."""
        wide, low = compute_dtype(p), self._low_shape(group, p)
        layout = {name: (wide, shape) for name, shape in self._projection_shapes(group, p).items()}
        for name, shape in self._moment_shapes(group, p).items():
            if shape == low and self._is_quantized(group, p):
                layout[f"{name}.codes"] = torch.uint8, shape
                layout[f"{name}.scale"] = torch.float32, (codec.block_count(math.prod(shape)),)
            else:
                layout[name] = wide, shape
        return layout

    def _init_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        if not self._is_own(group):
            return super()._init_state(group, p)
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name, (dtype, shape) in self._layout(group, p).items():
            state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
        return state

    def _read(self, state: dict[str, Any], name: str) -> Tensor:
        """A moment: the state itself, or what its codes stand for."""
        if name in state:
            return state[name]
        encoded = {part: state[f"{name}.{part}"] for part in ("codes", "scale")}
        return _decode(encoded, signed="sq" not in name)

    def _write(self, state: dict[str, Any], name: str, value: Tensor, skipped: Tensor | None) -> None:
        if name in state:
            parts = {name: value}
        else:
            encoded = _encode(value, signed="sq" not in name)
            parts = {f"{name}.{part}": tensor for part, tensor in encoded.items()}
        for key, new in parts.items():
            if new is not state[key]:
                state[key].copy_(new if skipped is None else torch.where(skipped, state[key], new))

    # --- the step ---

    def _step_group(self, group: dict[str, Any]) -> None:
        if self._is_own(group):
            self._step_own_group(group)
        else:
            super()._step_group(group)

    @torch._disable_dynamo
    def _step_own_group(self, group: dict[str, Any]) -> None:
        alike: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if not self.state[p]:
                self._init_state(group, p)
            alike.setdefault((p.device, compute_dtype(p)), []).append(p)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for (device, dtype), params in alike.items():
            lr = group["lr"]
            self._low_rank_step(
                group,
                params,
                lr.to(device, non_blocking=True).reshape(()) if isinstance(lr, Tensor) else lr,
                None if grad_scale is None else grad_scale.to(device, dtype, non_blocking=True).reshape(()),
                None if found_inf is None else found_inf.to(device, non_blocking=True).reshape(()) != 0,
            )

    def _bases(
        self, group: dict[str, Any], p: Tensor, g: Tensor, skipped: Tensor | None
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        """Sides and bases in force at this step, found anew from `g` every `update_proj_gap` steps.

        The step counter lives on the device, and stands still when a scaler skips a step. So the host counts calls,
        which are never fewer, and looks at the counter only when a new basis may be due.
        """
        names = list(self._projection_shapes(group, p))
        if not names:
            return (), []
        state, where = self.state[p], sides(g.shape, group["proj_type"])
        bases = [state[name] for name in names]
        left = self._until_look.get(p, 0)
        if left > 0:
            self._until_look[p] = left - 1
            return where, bases
        if skipped is not None and skipped.item():
            return where, bases
        step, gap = int(state["step"].item()), group["update_proj_gap"]
        self._until_look[p] = gap - 1 - step % gap
        if step % gap == 0:
            generator = torch.Generator()
            generator.manual_seed(stream_seed(stream_seed(group["seed"], self._indices[p]), step) % 2**63)
            rank = min(group["rank"], *g.shape)
            old = bases if step else None
            new = find_bases(g, rank, where, group["projection"], old, generator)
            for basis, value in zip(bases, new, strict=True):
                basis.copy_(value)
        return where, bases

    # --- checkpoints ---

    def _hyperparameters(self) -> list[str]:
        own = ("rank", "update_proj_gap", "scale", "proj_type", "projection")
        return [name for name in super()._hyperparameters() if name not in own]

    def _check_state(self, group: dict[str, Any], p: Tensor, identifier: Any, saved: dict[str, Any]) -> None:
        if not self._is_own(group):
            super()._check_state(group, p, identifier, saved)
            return
        where, layout = f"the state of parameter {identifier}", self._layout(group, p)
        if {"step", *layout} != set(saved):
            raise self._refuse(f"{where} has the keys {sorted(saved)}, expected {sorted({'step', *layout})}")
        step = saved["step"]
        step = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
        if not isinstance(step, (int, float)) or not 0 <= step <= 2**24 or step != int(step):
            raise self._refuse(f"{where}: step must be a whole number, got {step!r}")
        for name, (dtype, shape) in layout.items():
            value = saved[name]
            if not isinstance(value, Tensor) or value.shape != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise self._refuse(f"{where}: {name} must be a tensor of shape {shape}, got {got}")
            if value.is_floating_point() != dtype.is_floating_point:
                raise self._refuse(f"{where}: {name} has dtype {value.dtype}, expected {dtype}")

    def _loaded_state(self, group: dict[str, Any], p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        if not self._is_own(group):
            return super()._loaded_state(group, p, saved)
        step = torch.as_tensor(saved["step"]).detach().reshape(())
        state = {"step": step.to(device=p.device, dtype=torch.float32, copy=True)}
        for name, (dtype, _) in self._layout(group, p).items():
            state[name] = saved[name].detach().to(device=p.device, dtype=dtype, copy=True)
        return state


def compute_dtype(p: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32."""
    return torch.float64 if p.dtype is torch.float64 else torch.float32


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """A tensor of more dimensions is the matrix of its first one against the others; a vector is one row."""
    rows = x.shape[0] if x.dim() > 1 else 1
    return rows, math.prod(x.shape[1:]) if x.dim() > 1 else x.numel()


def matrix(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as a matrix of this dtype, itself where it is one already."""
    return x.to(dtype).reshape(matrix_shape(x))


def _check_count(function: str, name: str, value: Any, or_else: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{function}: {name} must be an integer >= 1{or_else}, got {value!r}")
