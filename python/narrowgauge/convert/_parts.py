"""What conversions do to a model: they plan new values and new modules first, and change the model at the end."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowgauge.norm import LayerNorm
from narrowgauge.swap import Unsuitable, _check_bare, _check_forward, _with_parameters

Place = tuple[nn.Module, str]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Plan:
    """New values of parameters and new modules, by place. Nothing changes before `apply`."""

    def __init__(self, function: str, model: nn.Module, dtype: torch.dtype) -> None:
        self.function, self.model, self.dtype = function, model, dtype
        self.values: dict[Place, Tensor] = {}
        self.modules: dict[nn.Module, nn.Module] = {}
        self.untied: set[Place] = set()
        self.attributes: list[tuple[object, str, object]] = []

    def part(self, name: str) -> nn.Module | Place:
        """The module of a name, or the place of the parameter."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            owner_name, _, key = name.rpartition(".")
            try:
                owner = self.model.get_submodule(owner_name)
            except AttributeError:
                owner = None
            if owner is not None and owner._parameters.get(key) is not None:
                return owner, key
        names = [n for n, _ in (*self.model.named_modules(), *self.model.named_parameters())]
        near = difflib.get_close_matches(name, names, 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{self.function}: the model has no module or parameter {name!r}{hint}")

    def module(self, name: str) -> nn.Module:
        part = self.part(name)
        if isinstance(part, tuple):
            raise ValueError(f"{self.function}: {name} is a parameter; expected a module")
        return part

    def value(self, place: Place) -> Tensor | None:
        """What a parameter will be, in the dtype of the conversion."""
        if place in self.values:
            return self.values[place]
        owner, key = place
        parameter = owner._parameters.get(key)
        return None if parameter is None else parameter.detach().to(self.dtype)

    def shared_elsewhere(self, place: Place, among: Iterable[Place]) -> list[str]:
        """Names under which the parameter hangs in the model besides the given places."""
        owner, key = place
        parameter = owner._parameters.get(key)
        allowed = {(id(o), k) for o, k in among}
        return [
            f"{name}.{k}" if name else k
            for name, module in self.model.named_modules()
            for k, p in module._parameters.items()
            if p is not None and p is parameter and (id(module), k) not in allowed
        ]

    def apply(self) -> None:
        """Changes the model; what can fail has been done before."""
        ready: list[tuple[Place, nn.Parameter | None, Tensor]] = []
        made: dict[int, nn.Parameter] = {}
        for (owner, key), value in self.values.items():
            old = owner._parameters.get(key)
            like = old if old is not None else next(p for p in owner._parameters.values() if p is not None)
            value = value.to(like.device, like.dtype)
            if old is not None and old.shape == value.shape and (owner, key) not in self.untied:
                ready.append(((owner, key), None, value))
                continue
            new = nn.Parameter(value.clone(), requires_grad=like.requires_grad)
            if old is not None and (owner, key) not in self.untied:
                new = made.setdefault(id(old), new)
            ready.append(((owner, key), new, value))
        with torch.no_grad():
            for (owner, key), parameter, value in ready:
                if parameter is None:
                    owner._parameters[key].copy_(value)  # type: ignore[union-attr]
                else:
                    owner._parameters[key] = parameter
        for parent in list(self.model.modules()):
            for key, child in parent._modules.items():
                if child is not None and child in self.modules:
                    parent._modules[key] = self.modules[child]
        for target, name, changed in self.attributes:
            setattr(target, name, changed)

    def refuse(self, name: str, reason: object) -> ValueError:
        return ValueError(f"{self.function}: {name}: {reason}")


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """The linear layer of GPT-2, whose weight is (in, out)."""
    weight = module._parameters.get("weight")
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and weight is not None
        and weight.dim() == 2
    )


def linear_axes(module: nn.Module) -> tuple[int, int]:
    """The axes (out, in) of the weight of a linear layer."""
    if isinstance(module, nn.Linear):
        _check_forward(module, nn.Linear)
        axes = 0, 1
    elif is_conv1d_of_transformers(module):
        axes = 1, 0
    else:
        raise Unsuitable(f"a {type(module).__name__} is not a linear layer")
    _check_bare(module, {"weight", "bias"})
    return axes


def output_axes(part: nn.Module | Place) -> dict[Place, int]:
    """The parameters of a writer, each with the axis that is the width of the stream."""
    if isinstance(part, tuple):
        owner, key = part
        parameter = owner._parameters[key]
        if type(parameter) is not nn.Parameter:
            raise Unsuitable(f"is a {type(parameter).__name__}")
        if "parametrizations" in owner._modules:
            raise Unsuitable("its module has parametrizations")
        return {part: parameter.dim() - 1}
    if isinstance(part, nn.Embedding):
        _check_forward(part, nn.Embedding)
        _check_bare(part, {"weight"})
        if part.max_norm is not None:
            raise Unsuitable("an embedding with max_norm changes its weight in each call")
        return {(part, "weight"): 1}
    if isinstance(part, CONVOLUTIONS):
        _check_bare(part, {"weight", "bias"})
        if part.groups != 1:
            raise Unsuitable("a convolution in groups cannot be re-centred over its channels")
        out = 0
    else:
        out, _ = linear_axes(part)
    axes = {(part, "weight"): out}
    if part._parameters.get("bias") is not None:
        axes[part, "bias"] = 0
    return axes


class Norm:
    """A LayerNorm of torch, of this package, or of a model that computes the same."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.offset = float(getattr(module, "weight_offset", 0.0))
        self.weight, self.bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if isinstance(module, (nn.LayerNorm, LayerNorm)):
            _check_forward(module, nn.LayerNorm if isinstance(module, nn.LayerNorm) else LayerNorm)
            _check_bare(module, {"weight", "bias"})
            if len(module.normalized_shape) != 1:
                raise Unsuitable(f"normalizes over {len(module.normalized_shape)} dimensions")
            self.width, self.eps = module.normalized_shape[0], module.eps
            return
        if self.weight is None or self.weight.dim() != 1:
            raise Unsuitable(f"a {type(module).__name__} is not a LayerNorm over the last dimension")
        _check_bare(module, set(module._parameters) & {"weight", "bias"})
        self.width = self.weight.numel()
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        self.eps = 1e-5 if eps is None else float(eps)
        self._probe()

    def _probe(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(*shape, self.width, generator=generator) for shape in ((2, 3), (), ()))
        x[0] *= self.eps**0.5  # rows this small show eps
        twin = _with_parameters(
            self.module,
            {"weight": nn.Parameter(weight), "bias": None if self.bias is None else nn.Parameter(bias)},
        )
        try:
            with torch.no_grad():
                y = twin(x)
        except Exception as error:
            raise Unsuitable(f"its forward failed on a small tensor: {error}") from error
        expected = F.layer_norm(x, (self.width,), weight, None if self.bias is None else bias, self.eps)
        if (
            not isinstance(y, Tensor)
            or y.shape != x.shape
            or not torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
        ):
            raise Unsuitable(f"a {type(self.module).__name__} does not compute a LayerNorm of eps {self.eps}")

    def affine(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift as numbers."""
        weight = None if self.weight is None else self.weight.detach().to(dtype) + self.offset
        return weight, None if self.bias is None else self.bias.detach().to(dtype)


def along(vector: Tensor, axis: int, dims: int) -> Tensor:
    """A vector shaped to be broadcast along one axis."""
    return vector.view([-1 if i == axis else 1 for i in range(dims)])


def fold_affine(plan: Plan, linear: nn.Module, width: int, scale: Tensor | None, shift: Tensor | None) -> int:
    """Puts ``scale * x + shift`` in front of a linear layer into it; returns the axis of its inputs."""
    _out_axis, in_axis = linear_axes(linear)
    weight, bias = plan.value((linear, "weight")), plan.value((linear, "bias"))
    assert weight is not None
    if weight.shape[in_axis] != width:
        raise Unsuitable(f"has {weight.shape[in_axis]} inputs; the norm has width {width}")
    if shift is not None:
        moved = (weight * along(shift.to(weight.device), in_axis, 2)).sum(in_axis)
        plan.values[linear, "bias"] = moved if bias is None else bias + moved
    if scale is not None:
        weight = weight * along(scale.to(weight.device), in_axis, 2)
    plan.values[linear, "weight"] = weight
    return in_axis


def untie(plan: Plan, place: Place, among: Iterable[Place]) -> None:
    """Lets a parameter that hangs elsewhere too be one of its own, and the model's configuration say so."""
    if plan.shared_elsewhere(place, among):
        plan.untied.add(place)
        config = getattr(plan.model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            plan.attributes.append((config, "tie_word_embeddings", False))
