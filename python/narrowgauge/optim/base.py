"""What all elementwise optimizers share: options, states, the step. An optimizer adds its rule and its arguments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
from torch import Tensor

from narrowgauge.ops import checks
from narrowgauge.optim import codec, nap, tensors
from narrowgauge.optim.checkpoint import Checkpoints
from narrowgauge.optim.elementwise import Rule
from narrowgauge.optim.l2_norm import squared_norms
from narrowgauge.optim.rows import on_device
from narrowgauge.optim.rule_samples import PARAM_UPDATES

if TYPE_CHECKING:
    from typing_extensions import Unpack  # noqa: F401

Params = Iterable[Any]

PARAM_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


class Common(TypedDict, total=False):
    """Keyword arguments of every elementwise optimizer, also options of a parameter group.

    Attributes:
        maximize: Go up instead of down.
        foreach, fused, capturable: Accepted for compatibility; every step is fused, and capturable on CUDA.
        differentiable: Must be False.
        state_dtype: ``"fp32"``, ``"bf16"``, ``"int8"``, ``"int4"``, ``"fp8"``, ``"fp8_expanded"`` or
            ``"int8_companded"``: how the states of parameters with at least `min_quantized_size` elements are stored
            (``"bf16"``: of all). float64 and complex128 parameters keep float64 states.
        param_update: How the new value of a bfloat16 parameter is kept. ``"nearest"``; ``"stochastic"``, under which
            small updates are not lost on average (bfloat16 states are then rounded so, too); ``"kahan"``, which keeps
            what was lost in ``param_comp`` (also float16); ``"split"``, which keeps the rest of a float32 master in
            ``param_low``. Parameters of other dtypes are rounded to nearest.
        split_bits: Bits of ``param_low``, 8 or 16.
        seed: Seed of the stochastic rounding.
        min_quantized_size: Smaller parameters keep float32 states. Counted over all shards.
        ema_decay: Keep a float32 moving average of the parameters, ``ema``, with this decay.
        project_norm: After the step scale every parameter (``True`` or ``"tensor"``), or each of its rows (``"row"``),
            back to the norm it had at its first step, ``rho`` (NaP, arXiv 2407.01800).
        project_every: Do so only at every so many-th step.
    """

    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    state_dtype: str
    param_update: str
    split_bits: int
    seed: int
    min_quantized_size: int
    ema_decay: float | None
    project_norm: bool | str
    project_every: int


COMMON_DEFAULTS: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
    "state_dtype": "fp32",
    "param_update": "nearest",
    "split_bits": 8,
    "seed": 0,
    "min_quantized_size": 4096,
    "ema_decay": None,
    "project_norm": False,
    "project_every": 1,
}


def check_range(function: str, name: str, value: Any, low: float, below: float = math.inf) -> None:
    """A hyperparameter must be a number in [low, below)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < below:
        interval = f"in [{low}, {below})" if below < math.inf else f">= {low}"
        raise ValueError(f"{function}: {name} must be a finite number {interval}, got {value!r}")


def check_betas(function: str, betas: Any, count: int = 2) -> None:
    """Decay rates: so many numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != count:
        words = {2: "two", 3: "three"}[count]
        raise ValueError(f"{function}: betas must be {words} numbers in [0, 1), got {betas!r}")
    for i, beta in enumerate(betas):
        check_range(function, f"betas[{i}]", beta, 0, 1)


def _getter(names: Sequence[str]) -> Callable[[dict[str, Any]], Iterable[Any]]:
    """``itemgetter``, which is several times faster than a comprehension, also for a single name."""
    if not names:
        return lambda state: ()
    return itemgetter(*names) if len(names) > 1 else lambda state: (state[names[0]],)


LISTS = ("params", "grads", "states", "scales", "steps", "rests", "emas", "copies")


class Call:
    """Parameters of a group that go into one call of the rule's operators.

    Attributes:
        whole: The parameters as the user has them.
        params, grads, states, scales, steps, rests, emas, copies: This process's shards, dense and laid out alike.
    """

    def __init__(
        self, optimizer: ElementwiseOptimizer, group: dict[str, Any], plain: bool, lists: list[list[Any]]
    ) -> None:
        self.optimizer, self.group, self.rule = optimizer, group, optimizer._rule
        self.variant = optimizer._variant(group)
        self.whole = lists[0]
        self.written_back: list[tuple[Tensor, Tensor]] = []
        whole_grads, copied = lists[1], not plain
        self.row_lengths: list[int] = []
        device = self.whole[0].device
        self.coded = bool(lists[3]) or (bool(lists[2]) and lists[2][0].dtype is torch.bfloat16)
        self.param_update = self._param_update()
        if not plain:
            lists = self._local_lists(lists)
        self.params, self.grads, self.states, self.scales, self.steps, self.rests, self.emas, self.copies = (
            lists
        )
        dtype, grad_dtype = self.params[0].dtype, self.grads[0].dtype
        if grad_dtype not in (dtype, torch.float32, torch.bfloat16) or (
            dtype is torch.float64 and grad_dtype is not torch.float64
        ):
            self.grads, copied = [g.to(dtype) for g in self.grads], True
        # Where the kernel works on a copy of the gradient, the gradient itself is zeroed by hand.
        self.copied_grads = [tensors.local(g) for g in whole_grads] if copied else []
        self.lr: float = 0.0
        self.lr_tensor: Tensor | None = None
        lr = group["lr"]
        if isinstance(lr, Tensor):
            kept = lr.dtype if lr.dtype in (torch.float32, torch.float64) else torch.float32
            self.lr_tensor = lr.to(device, kept, non_blocking=True)
        else:
            self.lr = lr
        self.grad_scale = optimizer._on(device, getattr(optimizer, "grad_scale", None))
        self.clip: Tensor | None = None
        self.found_inf = optimizer._on(device, getattr(optimizer, "found_inf", None))
        if optimizer._uses_rows(self.variant):
            self.row_lengths = [optimizer._row_length(group, p) for p in self.params]

    def _param_update(self) -> str:
        how, dtype = self.group["param_update"], self.whole[0].dtype
        fits = dtype is torch.bfloat16 or (how == "kahan" and dtype is torch.float16)
        rounds_states = how == "stochastic" and self.group["state_dtype"] == "bf16" and self.coded
        return how if fits or rounds_states else "nearest"

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def compute(self) -> torch.dtype:
        """The type of computation."""
        return torch.float64 if self.params[0].dtype is torch.float64 else torch.float32

    @property
    def state_format(self) -> int:
        return codec.FORMATS[self.group["state_dtype"] if self.coded else "fp32"].number

    def _numbers(self) -> tuple[Any, ...]:
        return (
            *(self.lr_tensor, self.lr, self.optimizer._options(self.group), self.variant, self.state_format),
            PARAM_UPDATES.index(self.param_update),
        )

    def learning_rate(self) -> Tensor:
        """The rate as a float64 tensor on the device."""
        if self.lr_tensor is not None:
            return self.lr_tensor.double().reshape(())
        return torch.full((), self.lr, dtype=torch.float64, device=self.device)

    def next_steps(self) -> Tensor:
        """The number of this step for each parameter, in float64."""
        return torch.stack(self.steps).double() + 1

    def counts(self) -> Tensor:
        """How many elements of the rule each parameter has over all shards, in float64: two per complex number."""
        counts = tuple(p.numel() * (2 if p.is_complex() else 1) for p in self.whole)
        return on_device(counts, torch.float64, self.device)

    def sums(self, given: Tensor | None = None) -> Tensor:
        """The rule's sums, float64 of shape (rows, sums), over all shards that have a part of a row."""
        result = self.rule.reduce(
            *(
                self.params,
                self.grads,
                self.states,
                self.scales,
                self.steps,
                given,
                *self._numbers(),
                self.rests,
            ),
            *(self.group["maximize"], self.row_lengths, self.grad_scale, self.clip),
        )
        inside_rows = True if self.row_lengths else None
        return tensors.sum_over_shards(result.double(), self.whole[0], inside_rows)

    def step(self, given: Tensor | None = None, rows: Tensor | None = None, zero_grad: bool = False) -> None:
        """The rule's step."""
        group = self.group
        stochastic = self.param_update == "stochastic"
        indices = [self.optimizer._indices[p] for p in self.whole] if stochastic else []
        first_elements = [tensors.first_element(p) for p in self.whole] if stochastic else []
        self.rule.step(
            *(
                self.params,
                self.grads,
                self.states,
                self.scales,
                self.steps,
                self.rests,
                self.emas,
                self.copies,
            ),
            *(given, rows, *self._numbers(), group["maximize"], zero_grad, group["ema_decay"] or 0.0),
            *(
                self.row_lengths,
                group["seed"],
                indices,
                first_elements,
                self.grad_scale,
                self.clip,
                self.found_inf,
            ),
        )
        if zero_grad:
            for g in self.copied_grads:
                if self.found_inf is None:
                    g.zero_()
                else:
                    g.copy_(torch.where(self.found_inf != 0, g, 0.0))
        self.finish()

    def finish(self) -> None:
        """What follows a change: copies go back to where they came from, and autograd learns of it."""
        for target, value in self.written_back:
            target.copy_(value)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(self.whole)

    def _local_lists(self, lists: list[list[Any]]) -> list[list[Any]]:
        """This process's shards, as real numbers in dense tensors of one layout."""
        params, grads, states, scales, steps, rests, emas, copies = lists
        result: list[list[Any]] = [[] for _ in LISTS]
        needs_rows = self.optimizer._uses_rows(self.variant) or self.group["project_norm"] == "row"
        per_param = len(states) // len(params)
        record = codec.FORMATS[self.group["state_dtype"]]
        packed = self.coded and record.codes_per_byte > 1

        def kept(x: Any, model: Tensor) -> Tensor:
            original = tensors.local(x)
            x = tensors.like(original, model)
            if x is not original:
                self.written_back.append((original, x))
            return x

        for i, p in enumerate(params):
            original = tensors.local(p)
            dense = original.is_contiguous() if needs_rows else tensors.is_dense(original)
            model = original if dense else original.contiguous()
            if model is not original:
                self.written_back.append((original, model))
            result[0].append(model)
            result[1].append(tensors.like(tensors.local(grads[i]), model))
            for state in states[
                i * per_param : (i + 1) * per_param
            ]:  # a shard may hold more codes than it needs
                codes = record.codes_shape((model.numel(),))[0] if packed else 0
                result[2].append(tensors.local(state)[:codes] if packed else kept(state, model))
            for scale in scales[i * per_param : (i + 1) * per_param]:
                blocks = codec.block_count(model.numel(), record.block_size)
                result[3].append(tensors.local(scale)[:blocks])
            result[4].append(steps[i])
            for k, extra in ((5, rests), (6, emas), (7, copies)):
                result[k] += [kept(extra[i], model)] if extra else []
        return result


class _Batch:
    """Parameters of a group that can go into one call."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain
        self.lists: tuple[list[Any], ...] = tuple([] for _ in LISTS)


class ElementwiseOptimizer(Checkpoints):
    """Base of the optimizers that run a rule over every element.

    A subclass sets `_rule` and defines `_check_options`, `_state_names` and `_options`; where its rule has variants or
    sums, `_variant` and `_given`.
    """

    _rule: ClassVar[Rule]
    # Whether `_given` looks into `state`: a compiled step only sees what is there when its first group is.
    _reads_states: ClassVar[bool] = False
    _step_supports_amp_scaling = True
    _only: set[Tensor] | None = None  # a step is then of these parameters alone
    _norm: Tensor | None = None  # written in place: compiled and captured steps cannot set attributes

    def __init__(self, params: Params, defaults: dict[str, Any], common: Common) -> None:
        unknown = set(common) - set(COMMON_DEFAULTS)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: unexpected argument {sorted(unknown)[0]!r}; beside its own arguments it "
                f"takes {', '.join(COMMON_DEFAULTS)}"
            )
        defaults = {**defaults, **COMMON_DEFAULTS, **common}
        self._copies: dict[Tensor, Tensor] = {}
        self._check_group(defaults)
        super().__init__(params, defaults)

    # --- what a subclass defines ---

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises for arguments of the rule that are out of range."""

    def _variant(self, group: dict[str, Any]) -> int:
        """Which variant of the rule the group takes."""
        return 0

    def _options(self, group: dict[str, Any]) -> list[float]:
        """The rule's numbers, in its order."""
        raise NotImplementedError

    def _row_length(self, group: dict[str, Any], p: Tensor) -> int:
        """How many elements share a row, for a rule by rows: all behind the first dimension."""
        return p.numel() // p.shape[0] if p.dim() > 1 and p.shape[0] else p.numel()

    def _signed(self, group: dict[str, Any]) -> tuple[bool, ...]:
        return self._rule.signed[self._variant(group)]

    def _given(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """What the rule is given: float64 of shape (parameters, numbers), and one number per row."""
        return None, None

    def _new_call(self, group: dict[str, Any], plain: bool, lists: list[list[Any]]) -> Call:
        """A call for parameters of a group; another class where the step is more than a rule's."""
        return Call(self, group, plain, lists)

    def _begin_step(self, calls: list[Call]) -> None:
        """Runs before the first call of a step changes anything, with all of them."""

    def _end_step(self, calls: list[Call]) -> None:
        """Runs after the last call of a step."""

    # --- groups ---

    def _check_group(self, group: dict[str, Any]) -> None:
        name, lr = type(self).__name__, group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1 or not lr.is_floating_point():
                raise ValueError(f"{name}: a tensor lr must be one floating-point number, got {lr!r}")
        else:
            check_range(name, "lr", lr, 0)
        self._check_options(group)
        checks.check_choice(name, "state_dtype", group["state_dtype"], codec.STATE_DTYPES)
        checks.check_choice(name, "param_update", group["param_update"], PARAM_UPDATES)
        checks.check_choice(name, "split_bits", group["split_bits"], (8, 16))
        seed = group["seed"]
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"{name}: seed must be an integer of 64 bits, got {seed!r}")
        check_range(name, "min_quantized_size", group["min_quantized_size"], 0)
        if group["ema_decay"] is not None:
            check_range(name, "ema_decay", group["ema_decay"], 0, 1)
        checks.check_choice(name, "project_norm", group["project_norm"], nap.CHOICES)
        every = group["project_every"]
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"{name}: project_every must be a whole number >= 1, got {every!r}")
        if group["differentiable"]:
            raise ValueError(
                f"{name}: differentiable=True is not offered, the fused step has no gradient; "
                "use an optimizer of torch.optim with differentiable=True"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            for p in params:
                tensor = p[1] if isinstance(p, tuple) else p
                if isinstance(tensor, Tensor) and tensor.dtype not in PARAM_DTYPES:
                    raise ValueError(
                        f"{type(self).__name__}: a parameter has dtype {tensor.dtype}; accepted are "
                        + ", ".join(str(dtype) for dtype in PARAM_DTYPES)
                    )
            param_group["params"] = params
        super().add_param_group(param_group)
        self._number_params()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self.__dict__.setdefault("_copies", {})
        self._number_params()

    def _number_params(self) -> None:
        self._indices = {
            p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in self.param_groups))
        }

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The norm of all gradients at the last step with `max_grad_norm`, on the device; NaN before the first."""
        return None if self._norm is None else self._norm.clone()

    def attach_copies(self, copies: dict[Tensor, Tensor]) -> None:
        """Keeps narrow copies of parameters up to date: every step writes them in the same pass.

        Args:
            copies: For each parameter a bfloat16, float16 or float32 tensor of its shape, on its device. They are
                written from the next step on; an empty dict detaches all.

        Raises:
            ValueError: A key is no parameter of this optimizer, or a copy does not fit.
        """
        for p, copy in copies.items():
            if p not in self._indices:
                raise ValueError("attach_copies: a key of copies is not a parameter of this optimizer")
            if (
                copy.shape != p.shape
                or copy.device != p.device
                or copy.dtype
                not in (
                    torch.bfloat16,
                    torch.float16,
                    torch.float32,
                )
            ):
                raise ValueError(
                    f"attach_copies: the copy of a parameter of shape {tuple(p.shape)} on {p.device} must have that "
                    "shape and device and be bfloat16, float16 or float32, "
                    f"got {copy.dtype} of shape {tuple(copy.shape)} on {copy.device}"
                )
            if p.dtype in (torch.float64, torch.complex64, torch.complex128):
                raise ValueError(f"attach_copies: parameters of dtype {p.dtype} have no narrow copies")
        self._copies = dict(copies)

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within the context the parameters have the values of their moving averages (groups with `ema_decay`)."""
        pairs = [
            (p, self.state[p]["ema"])
            for group in self.param_groups
            for p in group["params"]
            if "ema" in self.state.get(p, {})
        ]
        with torch.no_grad():
            kept = [p.detach().clone() for p, _ in pairs]
            for p, ema in pairs:
                p.copy_(ema)
            projected = [p for p, _ in pairs if "rho" in self.state[p]]
            nap.nap_(projected, [self.state[p]["rho"] for p in projected])
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), old in zip(pairs, kept, strict=True):
                    p.copy_(old)

    # --- the step ---

    def _uses_rows(self, variant: int) -> bool:
        return self._rule.rows

    @staticmethod
    def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
        return None if scalar is None else scalar.to(device, torch.float32, non_blocking=True)

    def _batches(self, group: dict[str, Any]) -> list[_Batch]:
        """The parameters that have a gradient, by what one call can take together. Runs at every step: kept lean."""
        names = self._state_names(group)
        coded_names = codec.FORMATS[group["state_dtype"]].block_size > 0
        code_names, scale_names = [f"{name}.codes" for name in names], [f"{name}.scale" for name in names]
        get_states, get_codes, get_scales = _getter(names), _getter(code_names), _getter(scale_names)
        by_rows = self._uses_rows(self._variant(group))
        with_sums = self._rule.sums_of(self._variant(group)) > 0
        ema, rest_name = group["ema_decay"] is not None, self._rest_name(group)
        projected = bool(group["project_norm"])
        copies, only = self._copies, self._only
        batches: dict[Any, _Batch] = {}
        previous = None
        for p in group["params"]:
            g = p.grad
            if g is None or (only is not None and p not in only):
                continue
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; use torch.optim.SparseAdam, "
                    "or build the layer with sparse=False"
                )
            state = self.state[p] or self._init_state(group, p)
            coded = bool(names) and coded_names and code_names[0] in state
            rest = rest_name is not None and rest_name in state
            copy = copies.get(p) if copies else None
            # Whether the kernel can work on both as they are; everything else goes through _local_lists.
            plain = (
                (type(p) is torch.nn.Parameter or type(p) is Tensor)
                and p.is_contiguous()
                and g.is_contiguous()
            )
            key: tuple[Any, ...] = (
                p.dtype,
                g.dtype,
                p.device,
                coded,
                plain,
                rest,
                copy is not None and copy.dtype,
            )
            if by_rows or with_sums or projected:
                key = (*key, tensors.sharding(p))
            if projected:
                key = (*key, p.dim() > 1)
            if key != previous:
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = _Batch(plain and not p.is_complex())
                params, grads, states, scales, steps, rests, emas, narrow = batch.lists
                previous = key
            params.append(p)
            grads.append(g)
            steps.append(state["step"])
            if coded:
                states += get_codes(state)
                scales += get_scales(state)
            else:
                states += get_states(state)
            if rest_name is not None and rest:
                rests.append(state[rest_name])
            if ema:
                emas.append(state["ema"])
            if copy is not None:
                narrow.append(copy)
        return list(batches.values())

    def _init_group(self, group: dict[str, Any], number: int, *lists: list[Any]) -> int:
        """Fills the lists with batch `number`; returns flags. torch.compile runs this eagerly, under this name."""
        if number == 0:
            if self._reads_states and group is self.param_groups[0]:
                for every in self.param_groups:
                    for p in every["params"]:
                        if p.grad is not None and not self.state[p]:
                            self._init_state(every, p)
            self._pending = self._batches(group)
            if self._pending and self._norm is None:
                self._norm = torch.full((), torch.nan, device=self._pending[0].lists[0][0].device)
        if number >= len(self._pending):
            return 0
        batch = self._pending[number]
        for target, source in zip(lists, batch.lists, strict=True):
            target.extend(source)
        return (1 if number + 1 < len(self._pending) else 0) | (0 if batch.plain else 2)

    def _calls(self) -> list[Call]:
        calls = []
        for group in self.param_groups:
            number, flags = 0, 1
            while flags & 1:
                params: list[Tensor] = []
                grads: list[Tensor] = []
                states: list[Tensor] = []
                scales: list[Tensor] = []
                steps: list[Tensor] = []
                rests: list[Tensor] = []
                emas: list[Tensor] = []
                copies: list[Tensor] = []
                flags = self._init_group(
                    group, number, params, grads, states, scales, steps, rests, emas, copies
                )
                if params:
                    lists = [params, grads, states, scales, steps, rests, emas, copies]
                    calls.append(self._new_call(group, flags < 2, lists))
                number += 1
        return calls

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_grad_norm: float | Tensor | None = None,
        zero_grad: bool = False,
    ) -> Any:
        """Performs one step.

        Args:
            closure: Reevaluates the model and returns the loss.
            max_grad_norm: Clip the gradients by their global norm, as ``torch.nn.utils.clip_grad_norm_`` does but
                without changing them: the factor is applied inside the step. The norm is left in `last_grad_norm`,
                on the device. When it is not finite nothing is changed at all.
            zero_grad: Set the gradients to zero in the same pass.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if max_grad_norm is not None and not isinstance(max_grad_norm, Tensor):
            check_range(type(self).__name__, "max_grad_norm", max_grad_norm, 0)
        calls = self._calls()
        if max_grad_norm is not None and calls:
            self._clip(calls, max_grad_norm)
        self._begin_step(calls)
        for call in calls:
            given, rows = self._given(call)
            call.step(given, rows, zero_grad)
        for call in calls:
            if call.group["project_norm"]:
                nap.project(call)
        self._end_step(calls)
        return loss

    def _global_norm(self, calls: list[Call]) -> Tensor:
        """The norm of all gradients together, in float64, on the device of the first call."""
        device = calls[0].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for call in calls:
            norms = squared_norms(call.grads, call.grad_scale)
            if any(tensors.is_dtensor(p) for p in call.whole):
                norms = torch.stack(
                    [tensors.sum_over_shards(norm, p) for norm, p in zip(norms, call.whole, strict=True)]
                )
            total += norms.sum().to(device)
        return total.sqrt()

    def _clip(self, calls: list[Call], max_grad_norm: float | Tensor) -> None:
        """Gives every call the factor that brings the norm of all gradients down to `max_grad_norm`."""
        norm = self._global_norm(calls)
        assert self._norm is not None
        self._norm.copy_(norm)
        factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0).float()
        skip = (~norm.isfinite()).float()
        factor = torch.where(norm.isfinite(), factor, 1.0)
        for call in calls:
            call.clip = factor.to(call.device)
            own = skip.to(call.device)
            call.found_inf = own if call.found_inf is None else torch.maximum(own, call.found_inf)
