"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from narrowgauge.ops import checks, system
from narrowgauge.ops.operator import FLOATING
from narrowgauge.optim import tensors
from narrowgauge.optim.adamw import AdamW
from narrowgauge.optim.base import Params, check_betas, check_range
from narrowgauge.optim.checkpoint import Entry
from narrowgauge.optim.matrix import (
    MatrixOptimizer,
    check_count,
    check_flag,
    learning_rate,
    like_parameter,
    shards,
    whole,
    wide_dtype,
)

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
Coefficients = tuple[float, float, float] | Sequence[tuple[float, float, float]]

# Defaults of groups with use_muon=False: those of the Adam in the authors' code.
ADAMW_DEFAULTS = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}


def _triples(function: str, name: str, coefficients: Any) -> list[tuple[float, float, float]]:
    """One triple of numbers per iteration; the last serves all further ones."""

    def is_triple(value: Any) -> bool:
        return (
            isinstance(value, (tuple, list))
            and len(value) == 3
            and all(isinstance(x, (int, float)) and math.isfinite(x) for x in value)
        )

    triples = [coefficients] if is_triple(coefficients) else coefficients
    if not isinstance(triples, (tuple, list)) or not triples or not all(map(is_triple, triples)):
        raise ValueError(
            f"{function}: {name} must be three numbers (a, b, c), or a sequence of such triples, "
            f"one per iteration; got {coefficients!r}"
        )
    return [tuple(triple) for triple in triples]


def newton_schulz(
    g: Tensor,
    steps: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    *,
    coefficients: Coefficients = COEFFICIENTS,
    eps: float = 1e-7,
    eps_mode: str = "clamp",
) -> Tensor:
    """Brings the singular values of matrices near 1 and keeps their singular vectors.

    Starting from X = g / norm(g), each iteration takes X to a X + b (X Xᵀ) X + c (X Xᵀ)² X. With the default
    coefficients five iterations end between 0.68 and 1.13, except for singular values near 0.

    Args:
        g: Matrices of shape (..., rows, columns), in float32, float64, bfloat16 or float16.
        steps: Number of iterations, below 100.
        dtype: Of the products and of the result.
        coefficients: The numbers a, b, c; or a sequence of such triples, one per iteration, whose last serves all
            further ones.
        eps: Bound of the norm.
        eps_mode: ``"clamp"`` divides by max(norm, eps), ``"add"`` by norm + eps.

    Returns:
        The orthogonalised matrices, in `dtype`.
    """
    checks.check_floating("newton_schulz", g=g)
    if g.dim() < 2:
        raise ValueError(f"newton_schulz: g must have at least two dimensions, got shape {tuple(g.shape)}")
    check_count("newton_schulz", "steps", steps, 0, 100)
    checks.check_choice("newton_schulz", "dtype", dtype, FLOATING)
    triples = _triples("newton_schulz", "coefficients", coefficients)
    check_range("newton_schulz", "eps", eps, 0)
    checks.check_choice("newton_schulz", "eps_mode", eps_mode, ("clamp", "add"))

    wide = torch.float64 if torch.float64 in (g.dtype, dtype) else torch.float32
    x = g.to(wide)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = (x / (norm.clamp_min(eps) if eps_mode == "clamp" else norm + eps)).to(dtype)
    x = x.reshape(-1, *g.shape[-2:]) if g.dim() > 3 else x
    is_tall = g.shape[-2] > g.shape[-1]
    if is_tall:
        x = x.mT
    multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for step in range(steps):
        a, b, c = triples[min(step, len(triples) - 1)]
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(g.shape)


class Muon(MatrixOptimizer):
    """Muon for the matrices of hidden layers, with AdamW for everything else, in one optimizer.

    The first arguments are those of `torch.optim.Muon`. Matrices of one shape are orthogonalised in one batch.
    Gradients are never modified. States are float32 (float64 for float64 parameters).

    Parameters of a group with ``use_muon=True`` are matrices (2-D), batches of matrices (3-D, such as experts; each is
    orthogonalised alone), or filters of convolutions (4-D and more; all dimensions but the first are flattened).
    A group with ``use_muon=False`` is updated by `AdamW` and takes its arguments; what the group does not give is
    lr=3e-4, betas=(0.9, 0.95), eps=1e-10 and weight_decay=0, whatever the arguments here. `muon_groups` makes the
    groups of a model.

    Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024; Liu et al., *Muon is
    Scalable for LLM Training*, arXiv 2502.16982.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, a number or a tensor.
        weight_decay: Decoupled weight decay.
        momentum: Decay rate of the average of gradients.
        nesterov: Look one step ahead along the momentum.
        ns_coefficients: Of `newton_schulz`: three numbers, or a triple per iteration.
        eps: Bound of the norm that a matrix is divided by.
        ns_steps: Number of iterations of `newton_schulz`.
        adjust_lr_fn: What multiplies the learning rate of a matrix: ``"original"`` or None, √max(1, rows / columns);
            ``"match_rms_adamw"``, 0.2 √max(rows, columns).
        maximize: Go up instead of down.
        ns_dtype: Dtype of the products of `newton_schulz`, also for float64 parameters.
        eps_mode: ``"clamp"`` divides by max(norm, eps) as torch does, ``"add"`` by norm + eps as the authors do.
        flatten: Whether all dimensions but the first are flattened; None: of parameters with four or more. True is
            for the 3-D filters of `nn.Conv1d`.
        filter_factor: Which rows and columns of a 4-D filter ``adjust_lr_fn="original"`` takes: ``"kernel"``, the
            last two dimensions as in the authors' code; or ``"matrix"``, those of the flattened matrix.
        use_muon: Whether groups that do not say so themselves take Muon.
        betas: Of AdamW; only with ``use_muon=False``.
    """

    _adamw: AdamW | None = None
    _own_options = ("maximize", "ns_dtype", "eps_mode", "flatten", "filter_factor", "use_muon", "betas")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        maximize: bool = False,
        ns_dtype: torch.dtype = torch.bfloat16,
        eps_mode: str = "clamp",
        flatten: bool | None = None,
        filter_factor: str = "kernel",
        use_muon: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "maximize": maximize,
                "ns_dtype": ns_dtype,
                "eps_mode": eps_mode,
                "flatten": flatten,
                "filter_factor": filter_factor,
                "use_muon": use_muon,
                "betas": betas,
            },
        )

    # --- groups ---

    def _check_options(self, group: dict[str, Any]) -> None:
        check_flag("Muon", "use_muon", group["use_muon"])
        check_betas("Muon", group["betas"])
        check_range("Muon", "momentum", group["momentum"], 0, 1)
        check_flag("Muon", "nesterov", group["nesterov"])
        _triples("Muon", "ns_coefficients", group["ns_coefficients"])
        check_range("Muon", "eps", group["eps"], 0)
        check_count("Muon", "ns_steps", group["ns_steps"], 0, 100)
        checks.check_choice(
            "Muon", "adjust_lr_fn", group["adjust_lr_fn"], (None, "original", "match_rms_adamw")
        )
        checks.check_choice("Muon", "ns_dtype", group["ns_dtype"], FLOATING)
        checks.check_choice("Muon", "eps_mode", group["eps_mode"], ("clamp", "add"))
        checks.check_choice("Muon", "flatten", group["flatten"], (None, False, True))
        checks.check_choice("Muon", "filter_factor", group["filter_factor"], ("kernel", "matrix"))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not group["use_muon"] and self._adamw is not None:
            self._adamw._check_group(group)

    def _check_param(self, group: dict[str, Any], p: Tensor) -> None:
        if group["use_muon"] and p.dim() < 2:
            raise ValueError(
                f"Muon: a parameter has shape {tuple(p.shape)}, which is no matrix; put it into a group with "
                "use_muon=False, which AdamW updates (muon_groups(model) makes such groups)"
            )
        if group["use_muon"] and group["flatten"] is False and p.dim() > 3:
            raise ValueError(
                f"Muon: flatten=False is for matrices and batches of them, got a parameter of shape {tuple(p.shape)}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and not param_group.get("use_muon", self.defaults["use_muon"]):
            param_group = dict(param_group)
            if self.defaults["use_muon"]:
                param_group = {**ADAMW_DEFAULTS, "maximize": self.defaults["maximize"], **param_group}
            else:  # the arguments of the constructor are AdamW's
                names = (*ADAMW_DEFAULTS, "maximize")
                param_group = {**{name: self.defaults[name] for name in names}, **param_group}
            AdamW([param_group])  # checks it, and adds the rest of AdamW's arguments
        super().add_param_group(param_group)
        self._join_adamw()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join_adamw()

    def _join_adamw(self) -> None:
        """Lets an AdamW work on this optimizer's own groups and states."""
        groups = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw = AdamW(groups) if groups else None
        if self._adamw is not None:
            self._adamw.state = self.state

    # --- checkpoints ---

    def _state_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        return {"momentum_buffer": like_parameter(p)}

    def _check_state(self, group: dict[str, Any], p: Tensor, identifier: Any, saved: dict[str, Any]) -> None:
        if group["use_muon"]:
            super()._check_state(group, p, identifier, saved)
        elif self._adamw is not None:
            self._adamw._check_state(group, p, identifier, saved)

    def _loaded_state(self, group: dict[str, Any], p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        if group["use_muon"] or self._adamw is None:
            return super()._loaded_state(group, p, saved)
        return self._adamw._loaded_state(group, p, saved)

    def dequantized_state_dict(self) -> dict[str, Any]:
        """A state dict with every coded state of AdamW decoded to float32."""
        result = super().dequantized_state_dict()
        if self._adamw is not None:
            adamw = AdamW([dict(group) for group in self._adamw.param_groups])
            own = {p for group in adamw.param_groups for p in group["params"]}
            adamw.state.update({p: state for p, state in self.state.items() if p in own})
            decoded = adamw.dequantized_state_dict()
            saved_groups = [group for group in result["param_groups"] if not group["use_muon"]]
            for saved, group in zip(saved_groups, decoded["param_groups"], strict=True):
                saved["state_dtype"] = group["state_dtype"]
                for identifier, other in zip(saved["params"], group["params"], strict=True):
                    if other in decoded["state"]:
                        result["state"][identifier] = decoded["state"][other]
        return result

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Performs one step.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        loss = super().step(closure)
        self._step_adamw()
        return loss

    @torch._disable_dynamo  # which does not know an optimizer inside another
    def _step_adamw(self) -> None:
        if self._adamw is not None:
            for name in ("grad_scale", "found_inf"):
                setattr(self._adamw, name, getattr(self, name, None))
            self._adamw.step()

    def _step_group(self, group: dict[str, Any]) -> None:
        if not group["use_muon"]:
            return
        for params in self._batches(group):
            self._step_batch(group, params)

    def _step_batch(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Updates parameters of one shape together."""
        p, momentum = params[0], group["momentum"]
        gradients = self._gradients(group, params)
        buffers = self._states(params, "momentum_buffer")
        before = torch.stack(buffers)
        averages = kept = before.lerp(gradients, 1 - momentum)
        directions = gradients.lerp(averages, momentum) if group["nesterov"] else averages

        lr = learning_rate(group, p)
        decay, rate = 1 - lr * group["weight_decay"], lr * self._factor(group, p)
        updates = self._orthogonalised(group, p, directions).mul_(rate)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            skipped = found_inf.to(p.device, non_blocking=True).reshape(()) != 0
            one = torch.ones((), dtype=updates.dtype, device=p.device)
            decay, updates = torch.where(skipped, one, decay), torch.where(skipped, 0.0, updates)
            kept = torch.where(skipped, before, averages)
        torch._foreach_copy_(buffers, kept.unbind())

        self._apply(params, decay, updates)

    def _matrix_shape(self, group: dict[str, Any], p: Tensor) -> tuple[int, int]:
        flatten = p.dim() > 3 if group["flatten"] is None else group["flatten"]
        return (p.shape[0], math.prod(p.shape[1:])) if flatten else (p.shape[-2], p.shape[-1])

    def _factor(self, group: dict[str, Any], p: Tensor) -> float:
        rows, columns = self._matrix_shape(group, p)
        if group["adjust_lr_fn"] == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        if p.dim() == 4 and group["filter_factor"] == "kernel":
            rows, columns = p.shape[-2:]
        return math.sqrt(max(1, rows / columns))

    def _orthogonalised(self, group: dict[str, Any], p: Tensor, directions: Tensor) -> Tensor:
        """The orthogonalised directions of parameters like `p`: this process's shards, stacked."""
        matrix_shape = self._matrix_shape(group, p)
        gather = _cuts_matrices(p, matrix_shape)
        if gather:
            directions = whole(directions.to(group["ns_dtype"]), p)  # half the traffic; rounded to it anyway
        orthogonal = newton_schulz(
            directions.reshape(-1, *matrix_shape),
            group["ns_steps"],
            group["ns_dtype"],
            coefficients=group["ns_coefficients"],
            eps=group["eps"],
            eps_mode=group["eps_mode"],
        ).reshape(directions.shape)
        if gather:
            orthogonal = shards(orthogonal, p)
        return orthogonal.to(wide_dtype(p), memory_format=torch.contiguous_format)


def _cuts_matrices(p: Any, matrix_shape: tuple[int, int]) -> bool:
    """Whether a process holds parts of matrices. Sharded experts, the first of three dimensions, are whole."""
    if not tensors.is_dtensor(p):
        return False
    experts = p.dim() == 3 and matrix_shape == tuple(p.shape[1:])
    return not all(
        placement.is_replicate() or (experts and placement.is_shard(0)) for placement in p.placements
    )


# --- groups of a model ---

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
FILTERS_1D = (nn.Conv1d, nn.ConvTranspose1d)
OUTPUT_NAMES = ("head", "heads", "classifier", "fc", "score", "output", "output_layer", "unembed")
EMBEDDING_WORDS = ("embed", "wte", "wpe", "token", "pos_")


def muon_groups(
    model: nn.Module, *, exclude: Iterable[str] = (), adamw: dict[str, Any] | None = None, **muon: Any
) -> list[dict[str, Any]]:
    """Parameter groups for `Muon`: matrices of hidden layers, and everything else for AdamW.

    AdamW gets parameters with fewer than two dimensions, embeddings (also shared with the output), output layers, and
    what `exclude` names. An output layer is what ``get_output_embeddings()`` returns, any ``lm_head``, or
    a direct child of the model that is called ``head``, ``classifier``, ``fc``, ``score``, ``output`` or the like; name
    others in `exclude`.

    Args:
        model: The model. Parameters that do not require gradients are left out.
        exclude: Patterns of parameter names for AdamW, such as ``"*.gate.*"``.
        adamw: Options of the group of AdamW.
        **muon: Options of the groups of Muon.

    Returns:
        Groups without empty ones: matrices, then 3-D filters of 1-D convolutions, then the rest.
    """
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    left_out, filters = set(), set()
    for name, module in model.named_modules():
        own = {id(p) for p in module.parameters(recurse=False)}
        is_output = name in OUTPUT_NAMES or name.rpartition(".")[2] == "lm_head"
        if isinstance(module, EMBEDDINGS) or is_output:
            left_out |= {id(p) for p in module.parameters()}
        elif isinstance(module, FILTERS_1D):
            filters |= own
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        left_out |= {id(p) for p in output.parameters()}

    matrices: list[Tensor] = []
    convolutions: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_embedding = any(word in name.rpartition(".")[2] for word in EMBEDDING_WORDS)
        excluded = id(p) in left_out or is_embedding or any(fnmatch(name, pattern) for pattern in patterns)
        if p.dim() < 2 or excluded:
            rest.append(p)
        else:
            (convolutions if id(p) in filters else matrices).append(p)
    groups = [
        {"params": matrices, "use_muon": True, **muon},
        {"params": convolutions, "use_muon": True, **muon, "flatten": True},
        {"params": rest, "use_muon": False, **(adamw or {})},
    ]
    return [group for group in groups if group["params"]]


system(
    "muon",
    title="Muon",
    source="Jordan et al. 2024; arXiv 2502.16982",
    page="optim/muon.md",
    functions=("optim.newton_schulz", "optim.muon_groups"),
    modules=("optim.Muon",),
    golden=("muon",),
    bench=("muon",),
    reasons={
        "reference": "Python around PyTorch's matmul",
        "cpu": "PyTorch's matmul",
        "cuda": "PyTorch's matmul",
    },
)
