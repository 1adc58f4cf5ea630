"""One way to time things, used by every benchmark.

The contestants of a case run in one process on the same random data, in rounds; each round runs every
contestant once, in a new order. A copy of as many bytes as the case must move is a contestant too, so the
roofline is measured under the same noise as everything else. Ratios are taken within a round and then
summed up: a machine that slows down for a while slows down both sides of a ratio.

On the CPU a sample is as many calls as fill a millisecond, with warm caches. On CUDA it is one call with
cold caches: the second-level cache is overwritten first, and the device is kept busy while the host
enqueues, so that the events around the call see the device's time and not the launch. Cases about call
overhead ask for host time on both.
"""

from __future__ import annotations

import ctypes
import fnmatch
import gc
import importlib.util
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from narrowgauge.cli.spread import Spread

OURS, COPY = "narrowgauge", "copy"

Call = Callable[[], object]


# --- What is compared ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where and how a run of benchmarks happens."""

    device: str = "cpu"
    compile: bool = True

    def random(
        self, *shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False
    ) -> torch.Tensor:
        """Normally distributed data: zeros cost less power and less time than real numbers."""
        return torch.randn(shape, device=self.device).to(dtype).requires_grad_(requires_grad)


@dataclass
class Contest:
    """The contestants of a case, ours first, and the bytes one call must move (None: no roofline)."""

    contestants: dict[str, Call]
    bytes_moved: int | None = None
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, build: Callable[[], Call], requires: str | None = None) -> None:
        """Adds a peer where its module is installed and can be imported, and notes the absence otherwise."""
        if requires and importlib.util.find_spec(requires) is None:
            self.absent[name] = f"{requires} is not installed"
            return
        try:
            self.contestants[name] = build()
        except ImportError as error:
            if not requires:
                raise
            self.absent[name] = f"{requires} cannot be imported: {error}"


@dataclass(frozen=True)
class Case:
    """One line of the table. Nothing is allocated before `build` is called."""

    operator: str
    detail: str
    build: Callable[[Setting], Contest]
    host_time: bool = False
    only_on: str | None = None  # the type of device without which it makes no sense

    @property
    def name(self) -> str:
        return f"{self.operator} {self.detail}"

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


Function = Callable[..., Any]


def compare(
    setting: Setting,
    ours: Function,
    eager: Function,
    inputs: Iterable[Any],
    *,
    backward: bool = False,
    bytes_moved: int | None = None,
    rivals: Mapping[str, Function] | None = None,
) -> Contest:
    """Ours, eager, and eager compiled, called with the same inputs.

    Args:
        setting: Where and how.
        ours: Function of the inputs, which returns a tensor or a tuple of them.
        eager: What a user would write in PyTorch; the same results.
        inputs: Arguments of all of them.
        backward: Time the forward together with the gradients of all inputs that require grad.
        bytes_moved: As in `Contest`.
        rivals: Further contestants, such as PyTorch's own layer.
    """
    inputs = list(inputs)
    differentiated = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    with torch.no_grad():
        gradients = [torch.randn_like(output) for output in tree_leaves(eager(*inputs))]

    def call(function: Function) -> Call:
        if not backward:
            return lambda: function(*inputs)
        return lambda: torch.autograd.grad(tree_leaves(function(*inputs)), differentiated, gradients)

    contest = Contest({OURS: call(ours), "eager": call(eager)}, bytes_moved)
    if setting.compile:
        contest.contestants["compile"] = call(torch.compile(eager, dynamic=False))
    for name, rival in (rivals or {}).items():
        contest.contestants[name] = call(rival)
    return contest


def traffic(*values: Any) -> int:
    """Bytes of all tensors in `values`, however nested in lists and dictionaries."""
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


# --- Clocks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """How a sample is taken: `time(function, calls)` gives the seconds per call."""

    time: Callable[[Call, int], float]
    sample_seconds: float = 0.0  # a sample is as many calls as fill this; 0: one call

    @classmethod
    def of(cls, device: str, host_time: bool) -> Clock:
        if device.startswith("cuda") and not host_time:
            return cls(cold_cuda_time(device))
        return cls(host_time_of(device), sample_seconds=1e-3)


def host_time_of(device: str) -> Callable[[Call, int], float]:
    """Wall time, with the device's queue drained on both sides."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def run(function: Call, calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - start) / calls

    return run


def cold_cuda_time(device: str) -> Callable[[Call, int], float]:
    """Device time of single calls that find nothing of their data in the cache."""
    properties = torch.cuda.get_device_properties(device)
    flood = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device=device)
    millisecond = 2_000_000  # clock cycles, about: enough for the host to enqueue the call meanwhile
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(function: Call, calls: int) -> float:
        seconds = 0.0
        for _ in range(calls):
            flood.zero_()
            torch.cuda._sleep(millisecond)
            start.record()
            function()
            end.record()
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3
        return seconds / calls

    return run


# --- Measuring ----------------------------------------------------------------------------------------------


class Comparison:
    """Times contestants round by round; driven by `measure`, or by pytest-benchmark."""

    def __init__(self, contestants: Mapping[str, Call], clock: Clock, *, seed: int = 0):
        self.contestants = dict(contestants)
        self.clock = clock
        self.samples: dict[str, list[float]] = {name: [] for name in contestants}
        self._calls = {name: self._warm_up(call) for name, call in self.contestants.items()}
        self._order = random.Random(seed)

    def _warm_up(self, call: Call) -> int:
        """Compiles, fills caches and pools, and finds how many calls make a sample."""
        for _ in range(3):
            once = self.clock.time(call, 1)
        return max(1, min(1000, round(self.clock.sample_seconds / max(once, 1e-9))))

    def round(self) -> None:
        """One sample of every contestant, in a new order."""
        names = list(self.contestants)
        self._order.shuffle(names)
        for name in names:
            self.samples[name].append(self.clock.time(self.contestants[name], self._calls[name]))

    def times(self) -> dict[str, Spread]:
        """Seconds per call."""
        return {name: Spread.of(samples) for name, samples in self.samples.items()}

    def ratios(self, name: str) -> dict[str, Spread]:
        """How many times longer than `name` each other contestant takes, paired within rounds."""
        base = self.samples[name]
        return {
            other: Spread.of([theirs / ours for theirs, ours in zip(samples, base, strict=True)])
            for other, samples in self.samples.items()
            if other != name
        }


@dataclass(frozen=True)
class Measurement:
    """What a case gave."""

    rounds: int
    times: dict[str, Spread]
    speedups: dict[str, Spread]  # per rival: its time over ours, above 1 where ours is faster
    roofline: dict[
        str, float
    ]  # per contestant: share of the copy's bandwidth, 1 is a copy; empty without bytes_moved
    bytes_moved: int | None

    @classmethod
    def of(cls, comparison: Comparison, ours: str, bytes_moved: int | None) -> Measurement:
        speedups = comparison.ratios(ours)
        speedups.pop(COPY, None)
        roofline = {}
        if COPY in comparison.samples:
            slower = comparison.ratios(COPY)
            roofline = {name: 1 / spread.median for name, spread in slower.items()}
        return cls(len(comparison.samples[ours]), comparison.times(), speedups, roofline, bytes_moved)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def with_copy(contestants: Mapping[str, Call], bytes_moved: int | None, device: str) -> dict[str, Call]:
    """Adds the copy that moves the same bytes: half of them read, half written."""
    if not bytes_moved:
        return dict(contestants)
    source = torch.randint(256, (max(bytes_moved // 2, 1),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {**contestants, COPY: lambda: target.copy_(source)}


def measure(
    contestants: Mapping[str, Call],
    *,
    bytes_moved: int | None = None,
    device: str = "cpu",
    seconds: float = 2.0,
    host_time: bool = False,
    clock: Clock | None = None,
    seed: int = 0,
) -> Measurement:
    """Compares contestants, the first of which is ours.

    Args:
        contestants: Functions without arguments, by name. All must have the data they need already.
        bytes_moved: Bytes that one call must read and write; adds the copy and the roofline.
        device: Where they run, which decides the clock.
        seconds: About how long to measure, after the warm-up; between 7 and 200 rounds fit into it.
        host_time: Wall time with warm caches on CUDA too, for call overhead.
        clock: Another clock than the device's.
        seed: Of the order within the rounds.
    """
    clock = clock or Clock.of(device, host_time)
    comparison = Comparison(with_copy(contestants, bytes_moved, device), clock, seed=seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        comparison.round()
        rounds = max(7, min(200, round(seconds / max(time.perf_counter() - start, 1e-9))))
        for _ in range(rounds - 1):
            comparison.round()
    finally:
        if collecting:
            gc.enable()
    return Measurement.of(comparison, next(iter(contestants)), bytes_moved)


def run(case: Case, setting: Setting, seconds: float = 2.0) -> dict[str, Any]:
    """One case from building its data to a JSON record."""
    torch.compiler.reset()  # every case compiles afresh, for its own shape
    torch.manual_seed(0)
    contest = case.build(setting)
    measurement = measure(
        contest.contestants,
        bytes_moved=contest.bytes_moved,
        device=setting.device,
        seconds=seconds,
        host_time=case.host_time,
    )
    return {
        "name": case.name,
        "operator": case.operator,
        "detail": case.detail,
        "host_time": case.host_time,
        "absent": contest.absent,
        **measurement.to_json(),
    }


# --- The setting of a whole run -----------------------------------------------------------------------------


def keep_freed_memory(reserve: int = 2**30) -> dict[str, Any]:
    """Makes glibc reuse freed pages for large tensors instead of asking the kernel for zeroed ones each time.

    First-touch page faults would otherwise be most of the time of contestants that return a large fresh
    tensor. Touching `reserve` bytes once puts them on top of the heap, where an aligned allocation finds
    room even when the hole that its predecessor left is a few bytes too small. It holds for the whole
    process, so for all contestants alike. Returns what was set, for the record.
    """
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1  # from malloc.h
    try:
        libc = ctypes.CDLL(None)
        accepted = libc.mallopt(mmap_threshold, largest) == 1 and libc.mallopt(trim_threshold, largest) == 1
    except (AttributeError, OSError, TypeError):
        return {"allocator": "default"}
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    if block := libc.malloc(reserve):
        ctypes.memset(block, 1, reserve)
        libc.free(block)
    return {
        "allocator": "glibc",
        "M_MMAP_THRESHOLD": largest,
        "M_TRIM_THRESHOLD": largest,
        "accepted": accepted,
        "touched_bytes": reserve,
    }


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes per second, read and written, of a copy much larger than the caches."""
    size = megabytes * 2**20
    copied = Comparison(with_copy({}, 2 * size, device), Clock.of(device, host_time=False))
    for _ in range(10):
        copied.round()
    return 2 * size / copied.times()[COPY].median


def cases_of(modules: Iterable[Any], device: str, pattern: str = "") -> list[Case]:
    """The cases for a device whose name has every word of the pattern; `*` stands for anything."""

    def chosen(case: Case) -> bool:
        words = case.name.lower().split()
        return all(fnmatch.filter(words, wanted) for wanted in pattern.lower().split())

    kind = device.partition(":")[0]
    return [
        case for module in modules for case in module.CASES if case.only_on in (None, kind) and chosen(case)
    ]
