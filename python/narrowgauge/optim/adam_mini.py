"""Adam-mini (Zhang et al., ICLR 2025, arXiv 2406.16793)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowgauge.ops import checks, system
from narrowgauge.optim import tensors
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, check_betas, check_range
from narrowgauge.optim.checkpoint import Entry
from narrowgauge.optim.elementwise import Rule, Scalar, integer_power
from narrowgauge.optim.rows import Rows, on_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

PARTITIONS = ("element", "row", "head", "tensor")

# Parts of names, in the order in which they are looked for; what has none of them gets one rate for the tensor.
_NAMES = {
    "element": ("bias",),
    "head": ("k_proj", "q_proj", "wq", "wk", "query", "key"),
    "row": (
        *(
            "embed",
            "embd",
            "wte",
            "lm_head",
            "output",
            "final_layer",
            "v_proj",
            "wv",
            "value",
            "o_proj",
            "wo",
        ),
        *("attn.proj", "feed_forward", "linear", "mlp"),
    ),
}
_UNDECAYED = ("norm", "ln", "bias")


def _partition(name: str, p: Tensor) -> str:
    for partition, parts in _NAMES.items():
        if any(part in name for part in parts):
            return "tensor" if partition == "row" and p.dim() < 2 else partition
    return "tensor"


def _scalars(
    variant: int, lr: Tensor, step: Tensor, given: list[Tensor], beta1: float, weight_decay: float
) -> tuple[Scalar, ...]:
    return 1 - lr * weight_decay, beta1, 1 - beta1


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor], step_size: Tensor
) -> tuple[Tensor, list[Tensor]]:
    decay, keep, weight = scalars
    m = states[0] * keep + weight * g
    return p * decay - step_size * m, [m]


adam_mini_rule = Rule(
    name="adam_mini",
    options=("beta1", "weight_decay"),
    signed=((True,),),
    scalars=_scalars,
    update=_update,
    terms=lambda variant, p, g, states, scalars: [g * g],
    sums=(1,),
    rows=True,
    sample_options=(0.9, 1e-2),
)


class AdamMini(ElementwiseOptimizer):
    """AdamW with one second moment for many elements: half the memory.

    Which elements share one follows from the parameter's name, as in the authors' implementation: a row of embeddings,
    output layers, values, projections and MLPs; a head of queries and keys; the whole tensor for everything else,
    normalizations above all. Biases keep one per element. Groups are made from that; their option `partition`
    (``"element"``, ``"row"``, ``"head"``, ``"tensor"``) can be given to `add_param_group` instead.

    Args:
        named_parameters: Names and parameters, as ``model.named_parameters()``.
        lr: Learning rate, a number or a tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, of parameters without "norm", "ln" or "bias" in their names.
        dim: Width of the transformer, for the size of a head: `dim` * `dim` / `n_heads` elements.
        n_heads: Its number of heads.
        n_kv_heads: Its number of heads of keys and values, a divisor of `n_heads`.
        **common: See `narrowgauge.optim.base.Common`.

    Raises:
        ValueError: A query or key by its name does not consist of whole heads.
    """

    _rule = adam_mini_rule
    _reads_states = True

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        dim: int = 2048,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        if dim < 1 or n_heads < 1 or dim * dim % n_heads:
            raise ValueError(f"AdamMini: n_heads must divide dim * dim, got dim={dim}, n_heads={n_heads}")
        if n_kv_heads is not None and (n_kv_heads < 1 or n_heads % n_kv_heads):
            raise ValueError(f"AdamMini: n_kv_heads must divide n_heads={n_heads}, got {n_kv_heads}")
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for item in named_parameters:
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
                raise TypeError(
                    "AdamMini: named_parameters must be names and parameters, as model.named_parameters(), "
                    f"got {type(item).__name__}"
                )
            name, p = item[0].lower(), item[1]
            if not p.requires_grad:
                continue
            partition, decays = _partition(name, p), not any(part in name for part in _UNDECAYED)
            if partition == "head" and p.numel() % (dim * dim // n_heads):
                raise ValueError(
                    f"AdamMini: {item[0]} is a query or key by its name, but its {p.numel()} elements are not "
                    f"heads of {dim * dim // n_heads}; give the model's dim and n_heads"
                )
            group = {"params": [], "partition": partition, "weight_decay": weight_decay if decays else 0.0}
            groups.setdefault((partition, decays), group)["params"].append(item)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "partition": "tensor",
            "head_numel": dim * dim // n_heads,
        }
        super().__init__(list(groups.values()), defaults, common)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if tensors.is_dtensor(p) and any(x.is_shard() and not x.is_shard(0) for x in p.placements):
                self.param_groups.pop()
                raise ValueError(
                    f"AdamMini: parameters may only be sharded in dimension 0, got {p.placements}; use AdamW"
                )

    def _check_options(self, group: dict[str, Any]) -> None:
        check_betas("AdamMini", group["betas"])
        check_range("AdamMini", "eps", group["eps"], 0)
        check_range("AdamMini", "weight_decay", group["weight_decay"], 0)
        checks.check_choice("AdamMini", "partition", group["partition"], PARTITIONS)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("m",)

    def _options(self, group: dict[str, Any]) -> list[float]:
        return [group["betas"][0], group["weight_decay"]]

    def _row_length(self, group: dict[str, Any], p: Tensor) -> int:
        partition = group["partition"]
        if partition == "row":
            return super()._row_length(group, p)
        length = {"element": 1, "head": group["head_numel"], "tensor": p.numel()}[partition]
        if partition == "head" and p.numel() % length:
            raise ValueError(f"AdamMini: {p.numel()} elements of a query or key are not heads of {length}")
        return min(length, p.numel())

    def _own_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        wide = torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32
        partition = group["partition"]
        if partition == "element":
            return {"v": Entry(wide)}
        if partition == "tensor":
            return {
                "vmean": Entry(wide, (lambda numel: (1,)) if tensors.is_dtensor(p) else (lambda numel: ()))
            }
        length = max(self._row_length(group, p), 1)
        return {"vmean": Entry(wide, lambda numel: (max(numel // length, 1), 1))}

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        group, partition, rows = call.group, call.group["partition"], Rows(call)
        beta1, beta2 = group["betas"]
        squares = call.sums()[:, 0]
        if partition == "tensor":
            squares = tensors.sum_over_shards(squares, call.whole[0], inside_rows=False)
            lengths = [p.numel() * (2 if p.is_complex() else 1) for p in call.whole]
        else:
            lengths = call.row_lengths
        weights = on_device(
            tuple((1 - beta2) / max(length, 1) for length in lengths), torch.float64, call.device
        )

        name = "v" if partition == "element" else "vmean"
        moments = [tensors.local(self.state[p][name]) for p in call.whole]
        old = [
            moment.view(-1) if moment.numel() == count else moment.view(-1)[:count]  # shards are padded
            for moment, count in zip(moments, rows.counts, strict=True)
        ]
        before = torch.cat(old).double()
        new = beta2 * before + rows.spread(weights) * squares
        if call.found_inf is not None:
            new = torch.where(call.found_inf != 0, before, new)
        torch._foreach_copy_(old, list(new.to(moments[0].dtype).split(rows.counts)))

        step = call.next_steps()
        correction = (1 - integer_power(beta2, step)).sqrt()
        rate = call.learning_rate() / (1 - integer_power(beta1, step)) * correction
        step_size = rows.spread(rate) / (new.sqrt() + rows.spread(group["eps"] * correction))
        return None, step_size.to(call.compute)


system(
    "adam_mini",
    title="Adam-mini",
    source="arXiv 2406.16793",
    page="optim/adam_mini.md",
    modules=("optim.AdamMini",),
    operators=("adam_mini_", "adam_mini_sums"),
    golden=("extra_optim",),
    bench=("adam_mini",),
)
