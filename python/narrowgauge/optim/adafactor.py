"""Adafactor (Shazeer and Stern, ICML 2018, arXiv 1804.04235), as torch.optim has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from narrowgauge.ops import Sample, SampleMaker, operator, system
from narrowgauge.optim import tensors
from narrowgauge.optim.base import Call, Common, ElementwiseOptimizer, Params, check_range
from narrowgauge.optim.checkpoint import Entry
from narrowgauge.optim.elementwise import Rule, square_root, step_reference
from narrowgauge.optim.rows import on_device
from narrowgauge.optim.rule_samples import PARAM_UPDATES

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _update(
    variant: int, p: Tensor, g: Tensor, states: list[Tensor], scalars: list[Tensor], root: Tensor
) -> tuple[Tensor, list[Tensor]]:
    decay, rate = scalars
    return p * decay - rate * (g / root), states


# The definition of the step sees every element as a row of its own, whose number is the root of its second moment.
adafactor_rule = Rule(
    name="adafactor",
    options=(),
    signed=((),),
    scalars=lambda variant, lr, step, given: (given[0], given[1]),
    update=_update,
    sums=(1,),
    given=(2,),
    rows=True,
    declared=False,
)
_step = step_reference(adafactor_rule)


def matrices(p: Tensor, row_length: int, matrix_rows: int) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a parameter; one without elements has a row and no column."""
    if not row_length:
        return 1, 1, 0
    return p.numel() // (row_length * matrix_rows), matrix_rows, row_length


def _gradients(
    params: list[Tensor], grads: list[Tensor], grad_scale: Tensor | None, clip: Tensor | None
) -> list[Tensor]:
    """Up to their sign."""
    compute = torch.float64 if params[0].dtype is torch.float64 else torch.float32
    result = []
    for g in grads:
        g = g.to(compute).flatten()
        if grad_scale is not None:
            g = g / grad_scale.to(compute)
        if clip is not None:
            g = g * clip.to(compute)
        result.append(g)
    return result


def _second_moments(
    params: list[Tensor],
    rows: Tensor,
    columns: Tensor,
    least: float,
    row_lengths: list[int],
    matrix_rows: list[int],
) -> list[Tensor]:
    """max(row * column, least) of every element."""
    result, first_row, first_column = [], 0, 0
    for p, length, count in zip(params, row_lengths, matrix_rows, strict=True):
        shape = matrices(p, length, count)
        own_rows = rows[first_row : first_row + shape[0] * shape[1]].view(shape[0], shape[1], 1)
        own_columns = columns[first_column : first_column + shape[0] * shape[2]].view(shape[0], 1, shape[2])
        product = own_rows * own_columns
        floor = torch.tensor(least, dtype=product.dtype, device=product.device)
        result.append(torch.where(product < floor, floor, product).flatten())
        first_row += shape[0] * shape[1]
        first_column += shape[0] * shape[2]
    return result


def _lists(make: SampleMaker, shapes: list[tuple[int, ...]], wide: torch.dtype) -> tuple[Any, ...]:
    params, grads = [make(*shape) for shape in shapes], [make(*shape) for shape in shapes]
    steps = [make(dtype=torch.float32, scale=0.0) + 1 for _ in shapes]
    lengths = [(p.shape[-1] if p.dim() else 1) if p.numel() else 0 for p in params]
    rows = [p.shape[-2] if p.dim() > 1 and p.numel() else 1 for p in params]
    shaped = [matrices(p, *cut) for p, cut in zip(params, zip(lengths, rows, strict=True), strict=True)]
    factors = [
        make(sum(n * size for n, size in sizes), dtype=wide).abs() + 0.1
        for sizes in ([(n, r) for n, r, _ in shaped], [(n, c) for n, _, c in shaped])
    ]
    return params, grads, steps, lengths, rows, factors


_SHAPES: list[tuple[int, ...]] = [(17, 9), (5,), (), (0, 3), (6, 4, 3, 3), (3, 2100), (70, 33)]


def _wide(make: SampleMaker) -> torch.dtype:
    return torch.float64 if make.dtype is torch.float64 else torch.float32


def _sums_samples(make: SampleMaker) -> Iterator[Sample]:
    params, grads, steps, lengths, rows, _ = _lists(make, _SHAPES, _wide(make))
    yield Sample(
        (params, grads, steps, lengths, rows, None, None), "matrices, vectors, batches, more than a tile"
    )
    scale = make(dtype=torch.float32, scale=0.0) + 3.0
    yield Sample((params[:2], grads[:2], steps[:2], lengths[:2], rows[:2], scale, scale), "scaled")


def _bytes(*args: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor))


@operator(
    "adafactor_sums(Tensor[] params, Tensor[] grads, Tensor[] steps, int[] row_lengths, int[] matrix_rows, "
    "Tensor? grad_scale, Tensor? clip) -> (Tensor, Tensor, Tensor)",
    samples=_sums_samples,
    tolerance="rounding",
    bytes_moved=_bytes,
)
def adafactor_sums(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    row_lengths: list[int],
    matrix_rows: list[int],
    grad_scale: Tensor | None,
    clip: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The squares of the gradients by rows and by columns of each matrix, and the squares of each parameter."""
    by_rows, by_columns, squares = [], [], []
    compute = torch.float64 if params[0].dtype is torch.float64 else torch.float32
    for p, g, length, count in zip(
        params, _gradients(params, grads, grad_scale, clip), row_lengths, matrix_rows, strict=True
    ):
        square = (g * g).double().view(matrices(p, length, count))
        by_rows.append(square.sum(2).flatten())
        by_columns.append(square.sum(1).flatten())
        wide = p.to(compute)
        squares.append((wide * wide).double().sum())
    return torch.cat(by_rows).to(compute), torch.cat(by_columns).to(compute), torch.stack(squares).to(compute)


def _norms_samples(make: SampleMaker) -> Iterator[Sample]:
    params, grads, steps, lengths, rows, factors = _lists(make, _SHAPES, _wide(make))
    yield Sample((params, grads, steps, *factors, 0.05, lengths, rows, None, None), "several shapes")


@operator(
    "adafactor_norms(Tensor[] params, Tensor[] grads, Tensor[] steps, Tensor rows, Tensor columns, float least, "
    "int[] row_lengths, int[] matrix_rows, Tensor? grad_scale, Tensor? clip) -> Tensor",
    samples=_norms_samples,
    tolerance="rounding",
    bytes_moved=_bytes,
)
def adafactor_norms(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    rows: Tensor,
    columns: Tensor,
    least: float,
    row_lengths: list[int],
    matrix_rows: list[int],
    grad_scale: Tensor | None,
    clip: Tensor | None,
) -> Tensor:
    """The squares of gradient over root second moment, of each parameter."""
    moments = _second_moments(params, rows, columns, least, row_lengths, matrix_rows)
    gradients = _gradients(params, grads, grad_scale, clip)
    norms = [(g * g / v).double().sum() for g, v in zip(gradients, moments, strict=True)]
    return torch.stack(norms).to(rows.dtype)


def _step_samples(make: SampleMaker) -> Iterator[Sample]:
    def sample(
        shapes: list[tuple[int, ...]],
        name: str,
        how: str = "nearest",
        maximize: bool = False,
        followed: bool = False,
        found_inf: bool = False,
    ) -> Sample:
        params, grads, steps, lengths, rows, factors = _lists(make, shapes, _wide(make))
        rests = [make(*p.shape) * 1e-3 for p in params] if how == "kahan" else []
        emas = [make(*p.shape, dtype=torch.float32) for p in params] if followed else []
        given = make(len(params), 2, dtype=torch.float64).abs() * 0.1 + 0.5
        scale = make(dtype=torch.float32, scale=0.0) + 1.0
        stochastic = how == "stochastic"
        indices, firsts = (
            (list(range(len(params))), [3 * i for i in range(len(params))]) if stochastic else ([], [])
        )
        return Sample(
            (
                *(params, grads, steps, rests, emas, [], given, *factors, 0.05, PARAM_UPDATES.index(how)),
                *(maximize, followed, 0.9, lengths, rows, 7, indices, firsts),
                *(scale if found_inf else None, None, scale if found_inf else None),
            ),
            name,
        )

    yield sample(_SHAPES, "matrices, vectors, batches, more than a tile")
    yield sample(
        [(33, 9), (300,)], "up, with a moving average and zeroed gradients", maximize=True, followed=True
    )
    yield sample([(33, 9)], "skipped", found_inf=True)
    if make.dtype is torch.bfloat16:
        yield sample([(33, 9), (300,)], "stochastic rounding", how="stochastic")
        yield sample([(33, 9), (300,)], "Kahan's compensation", how="kahan")


def _step_bytes(*args: Any) -> int:
    params, _, _, rests, emas = args[:5]
    return _bytes(args) + _bytes(params, rests, emas)


@operator(
    "adafactor_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] steps, Tensor(d!)[] rests, Tensor(e!)[] emas, "
    "Tensor(f!)[] copies, Tensor given, Tensor rows, Tensor columns, float least, int param_update, bool maximize, "
    "bool zero_grad, float ema_decay, int[] row_lengths, int[] matrix_rows, int seed, int[] indices, "
    "int[] first_elements, Tensor? grad_scale, Tensor? clip, Tensor? found_inf) -> ()",
    samples=_step_samples,
    tolerance="exact",
    bytes_moved=_step_bytes,
)
def adafactor_(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    rests: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    given: Tensor,
    rows: Tensor,
    columns: Tensor,
    least: float,
    param_update: int,
    maximize: bool,
    zero_grad: bool,
    ema_decay: float,
    row_lengths: list[int],
    matrix_rows: list[int],
    seed: int,
    indices: list[int],
    first_elements: list[int],
    grad_scale: Tensor | None,
    clip: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Multiplies parameters by `given[:, 0]` and subtracts `given[:, 1]` times gradient over root second moment."""
    moments = _second_moments(params, rows, columns, least, row_lengths, matrix_rows)
    roots = [square_root(v) if v.numel() else v.new_ones(1) for v in moments]
    each = [1 if p.numel() else 0 for p in params]
    _step(
        *(params, grads, [], [], steps, rests, emas, copies, given, torch.cat(roots), None, 0.0, [], 0, 0),
        *(param_update, maximize, zero_grad, ema_decay, each, seed, indices, first_elements),
        *(grad_scale, clip, found_inf),
    )


class _AdafactorCall(Call):
    """A call whose parameters are cut into matrices."""

    columns: Tensor
    least: float

    @property
    def matrix_rows(self) -> list[int]:
        return [p.shape[-2] if p.dim() > 1 and p.numel() else 1 for p in self.params]

    def step(self, given: Tensor | None = None, rows: Tensor | None = None, zero_grad: bool = False) -> None:
        group = self.group
        stochastic = self.param_update == "stochastic"
        indices = [self.optimizer._indices[p] for p in self.whole] if stochastic else []
        adafactor_(
            *(self.params, self.grads, self.steps, self.rests, self.emas, self.copies, given, rows),
            *(self.columns, self.least, PARAM_UPDATES.index(self.param_update), group["maximize"]),
            *(zero_grad, group["ema_decay"] or 0.0, self.row_lengths, self.matrix_rows, group["seed"]),
            *(indices, [0] * len(indices), self.grad_scale, self.clip, self.found_inf),
        )
        self.finish()


class Adafactor(ElementwiseOptimizer):
    """A drop-in for `torch.optim.Adafactor`: the second moment of a matrix is one number per row and per column.

    Of a parameter with more than two dimensions every matrix of the last two is one for itself; vectors keep a whole
    second moment. There is no first moment. Nothing is read on the host.

    Args:
        params: Parameters or parameter groups.
        lr: Largest learning rate; it is multiplied by the root mean square of the parameter.
        beta2_decay: At step t the second moments take the new value with weight t ** `beta2_decay`.
        eps: The least root second moment (None: the machine epsilon of the parameter's dtype), and the least root
            mean square of a parameter.
        d: A step with a larger root mean square is scaled down to it.
        weight_decay: Decoupled weight decay, by lr.
        **common: See `narrowgauge.optim.base.Common`; `state_dtype` and ``param_update="split"`` are not offered.

    Raises:
        ValueError: An argument is out of range, or a parameter is complex or sharded.
    """

    _rule = adafactor_rule
    _reads_states = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, common)

    def _check_options(self, group: dict[str, Any]) -> None:
        decay, eps = group["beta2_decay"], group["eps"]
        if not isinstance(decay, (int, float)) or isinstance(decay, bool) or not decay <= 0:
            raise ValueError(f"Adafactor: beta2_decay must be a number <= 0, got {decay!r}")
        if not isinstance(eps, (tuple, list)) or len(eps) != 2:
            raise ValueError(f"Adafactor: eps must be two numbers, the first may be None, got {eps!r}")
        if eps[0] is not None:
            check_range("Adafactor", "eps[0]", eps[0], 0)
        check_range("Adafactor", "eps[1]", eps[1], 0)
        check_range("Adafactor", "d", group["d"], 1)
        check_range("Adafactor", "weight_decay", group["weight_decay"], 0)
        if group["state_dtype"] != "fp32":
            raise ValueError(
                f"Adafactor: its states are small already, state_dtype must be 'fp32', got {group['state_dtype']!r}"
            )
        if group["param_update"] == "split":
            raise ValueError("Adafactor: param_update='split' is not offered; take 'kahan' or 'stochastic'")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            reason = "complex" if p.is_complex() else "sharded" if tensors.is_dtensor(p) else None
            if reason is not None:
                self.param_groups.pop()
                raise ValueError(
                    f"Adafactor: a parameter is {reason}, which is not offered; use AdamW with state_dtype='int8'"
                )

    def _new_call(self, group: dict[str, Any], plain: bool, lists: list[list[Any]]) -> Call:
        return _AdafactorCall(self, group, plain, lists)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ()

    def _options(self, group: dict[str, Any]) -> list[float]:
        return []

    def _row_length(self, group: dict[str, Any], p: Tensor) -> int:
        return (p.shape[-1] if p.dim() else 1) if p.numel() else 0

    def _own_layout(self, group: dict[str, Any], p: Tensor) -> dict[str, Entry]:
        dtype = torch.float64 if p.dtype is torch.float64 else torch.float32
        if p.dim() < 2:
            return {"variance": Entry(dtype)}
        rows, columns = (*p.shape[:-1], 1), (*p.shape[:-2], 1, p.shape[-1])
        return {
            "row_var": Entry(dtype, lambda numel: tuple(rows)),
            "col_var": Entry(dtype, lambda numel: tuple(columns)),
        }

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        assert isinstance(call, _AdafactorCall)
        group, device, cuts = call.group, call.device, (call.row_lengths, call.matrix_rows)
        shapes = [matrices(p, *cut) for p, cut in zip(call.params, zip(*cuts, strict=True), strict=True)]
        row_counts, column_counts = [n * r for n, r, _ in shapes], [n * c for n, _, c in shapes]
        heights = [r for n, r, _ in shapes for _ in range(n)]  # of all matrices

        def constant(values: list[int]) -> Tensor:
            return on_device(tuple(values), torch.int64, device)

        def spread(values: Tensor, counts: list[int]) -> Tensor:
            return values.repeat_interleave(constant(counts), output_size=sum(counts))

        lists, scales = (call.params, call.grads, call.steps), (call.grad_scale, call.clip)
        row_sums, column_sums, squares = adafactor_sums(*lists, *cuts, *scales)
        step = call.next_steps()
        weight = step ** group["beta2_decay"]

        def advance(names: tuple[str, ...], sums: Tensor, counts: list[int], over: list[int]) -> Tensor:
            """Moves the second moments by rows or columns on; what is not stored stays the mean."""
            mean = sums.double() / spread(constant(over), counts)
            stored = [next((self.state[p][n] for n in names if n in self.state[p]), None) for p in call.whole]
            parts = [
                part if old is None or not p.numel() else old.reshape(-1)
                for p, old, part in zip(call.whole, stored, mean.split(counts), strict=True)
            ]
            old = torch.cat(parts)
            new = old + spread(weight, counts) * (mean - old)
            if call.found_inf is not None:
                new = torch.where(call.found_inf != 0, old, new)
            pairs = [
                (part, value) for part, value in zip(parts, new.split(counts), strict=True) if part.numel()
            ]
            if pairs:
                values = [value.to(part.dtype) for part, value in pairs]
                torch._foreach_copy_([part for part, _ in pairs], values)
            return new

        by_rows = advance(("row_var",), row_sums, row_counts, [max(c, 1) for *_, c in shapes])
        by_columns = advance(("col_var", "variance"), column_sums, column_counts, [r for _, r, _ in shapes])

        eps1 = torch.finfo(call.params[0].dtype).eps if group["eps"][0] is None else group["eps"][0]
        mean = torch.segment_reduce(by_rows, "mean", lengths=constant(heights), unsafe=True).clamp_min(eps1)
        vectors = constant([p.dim() < 2 for p in call.params]).bool()  # one row, whose factor is 1
        rows = torch.where(spread(vectors, row_counts), 1.0, by_rows / spread(mean, heights)).to(call.compute)
        call.columns, call.least = by_columns.to(call.compute), eps1 * eps1

        sizes = constant([max(p.numel(), 1) for p in call.params])
        norms = adafactor_norms(*lists, rows, call.columns, call.least, *cuts, *scales)
        lr = call.learning_rate()
        rate = torch.minimum(lr, 1 / step.sqrt()) * (squares.double() / sizes).sqrt().clamp_min(
            group["eps"][1]
        )
        rate = rate / ((norms.double() / sizes).sqrt() / group["d"]).clamp_min(1.0)
        return torch.stack(((1 - lr * group["weight_decay"]).expand_as(rate), rate), 1), rows


system(
    "adafactor",
    title="Adafactor",
    source="arXiv 1804.04235",
    page="optim/adafactor.md",
    modules=("optim.Adafactor",),
    operators=("adafactor_sums", "adafactor_norms", "adafactor_"),
    golden=("torch_optim",),
    bench=("adafactor",),
)
