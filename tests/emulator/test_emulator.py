"""The emulator is right about kernels that are right, and names what is wrong with the others.

The kernels are those of csrc/emulator/self_test.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.emulator.loading import ROOT
from tests.emulator.mutate import find_barriers

pytestmark = pytest.mark.emulator

SCHEDULES = range(12)
SHARED_BYTES = 4096


def run(
    emulator: ModuleType, kernel: str, x: np.ndarray, blocks: int, threads: int, cluster: int = 1
) -> np.ndarray:
    tensor = emulator.Tensor(x, "float32")
    return emulator.self_test.run(kernel, tensor, blocks, threads, SHARED_BYTES, cluster).numpy()


def rotate(x: np.ndarray, size: int) -> np.ndarray:
    """Four times: add the next value, within groups of `size`."""
    groups = x.reshape(-1, size)
    for _ in range(4):
        groups = groups + np.roll(groups, -1, axis=1)
    return groups.reshape(-1)


def rotate_blocks(x: np.ndarray) -> np.ndarray:
    """The same, from each of four blocks of 64 to the next."""
    across = x.reshape(-1, 4, 64).swapaxes(1, 2)
    return rotate(across, 4).reshape(across.shape).swapaxes(1, 2).reshape(-1)


def histogram(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.bincount(block.astype(int), minlength=64) for block in x.reshape(-1, 64)])


def reductions(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(-1, 64)
    four = np.stack([blocks.max(1), -blocks.max(1), blocks.sum(1), blocks.sum(1)], axis=1)
    return np.tile(four, (1, 16)).reshape(-1)


def shuffles(x: np.ndarray, width: int) -> np.ndarray:
    groups, lane = x.reshape(-1, width), np.arange(width)
    index, flipped = np.repeat(groups[:, 3:4], width, axis=1), groups[:, lane ^ 1]
    up, down = groups[:, np.maximum(lane - 1, 0)], groups[:, np.where(lane + 2 < width, lane + 2, lane)]
    return (index + 64 * (up + 64 * (down + 64 * flipped))).reshape(-1)


def votes(x: np.ndarray) -> np.ndarray:
    halves, blocks = x.reshape(-1, 16), x.reshape(-1, 64)
    of_halves = ((halves > 0).sum(1), (halves > 0).any(1), (halves > 0).all(1), halves.max(1))
    of_blocks = ((blocks > 0).sum(1), (blocks > 0).any(1), (blocks > 0).all(1))
    lanes, any_, all_, largest = (np.repeat(value, 16) for value in of_halves)
    count, some, every = (np.repeat(value, 64) for value in of_blocks)
    return lanes + 32 * (any_ + 2 * (all_ + 2 * (some + 2 * (every + 2 * (largest + 64 * count)))))


def small_numbers() -> np.ndarray:
    """512 whole numbers below 64, with whole stretches of zeros: sums of them are exact in float32."""
    x = np.random.default_rng(7).integers(0, 64, 512)
    x[64:80] = x[128:192] = 0
    x[256:320] += x[256:320] == 0
    return x.astype(np.float32)


# kernel: blocks, threads, cluster, what NumPy says
CORRECT: dict[str, tuple[int, int, int, Callable[[np.ndarray], Any]]] = {
    "block_rotate": (8, 64, 1, lambda x: rotate(x, 64)),
    "warp_rotate": (8, 64, 1, lambda x: rotate(x, 32)),
    "cluster_rotate": (8, 64, 4, rotate_blocks),
    "async_reverse": (1, 32, 1, lambda x: x.reshape(-1, 128)[:, ::-1].reshape(-1)),
    "shared_histogram": (8, 64, 1, histogram),
    "atomics": (8, 64, 1, reductions),
    "shuffles": (8, 64, 1, lambda x: shuffles(x, 32)),
    "shuffles_by_eight": (8, 64, 1, lambda x: shuffles(x, 8)),
    "votes": (8, 64, 1, votes),
    "vector_double": (2, 64, 1, lambda x: 2 * x),
}


@pytest.mark.parametrize("kernel", CORRECT)
def test_a_correct_kernel_gives_the_right_result_in_every_schedule(emulator: ModuleType, kernel: str) -> None:
    blocks, threads, cluster, expected = CORRECT[kernel]
    x = small_numbers()
    for seed in SCHEDULES:
        emulator.set_schedule(seed)
        np.testing.assert_array_equal(run(emulator, kernel, x, blocks, threads, cluster), expected(x))


def test_the_same_seed_gives_the_same_schedule(emulator: ModuleType) -> None:
    """Seen through a race: what it gives depends on the order of the threads and on nothing else."""
    emulator.disable_barrier(barriers_of("block_rotate")[1])
    x = small_numbers()

    def outcomes() -> list[bytes]:
        results = []
        for seed in SCHEDULES:
            emulator.set_schedule(seed)
            results.append(run(emulator, "block_rotate", x, 8, 64).tobytes())
        return results

    first = outcomes()
    assert first == outcomes()
    assert len(set(first)) > 1


# --- planted faults ---


def barriers_of(kernel: str) -> list[str]:
    """The barriers in the source of one kernel of self_test.cpp."""
    source = (ROOT / "csrc/emulator/self_test.cpp").read_text()
    kernels = re.finditer(r"^__global__ void (\w+)", source, re.MULTILINE)
    starts = {kernel[1]: source[: kernel.start()].count("\n") for kernel in kernels}
    first = starts[kernel]
    last = min((line for line in starts.values() if line > first), default=source.count("\n"))
    return [f"emulator/self_test.cpp:{line}" for line in find_barriers(source) if first < line <= last]


BARRIERS = [
    (kernel, site) for kernel in CORRECT if kernel != "shuffles_by_eight" for site in barriers_of(kernel)
]


@pytest.mark.parametrize(("kernel", "site"), BARRIERS, ids=[f"{kernel}-{site}" for kernel, site in BARRIERS])
def test_the_loss_of_a_barrier_is_noticed(emulator: ModuleType, kernel: str, site: str) -> None:
    blocks, threads, cluster, expected = CORRECT[kernel]
    x = small_numbers()
    emulator.disable_barrier(site)
    noticed = 0
    for seed in SCHEDULES:
        emulator.set_schedule(seed)
        try:
            noticed += not np.array_equal(run(emulator, kernel, x, blocks, threads, cluster), expected(x))
        except emulator.EmulatorError:
            noticed += 1
    assert site in emulator.barrier_sites()
    assert noticed >= len(SCHEDULES) // 3


@pytest.mark.parametrize("kernel", ["block_rotate", "warp_rotate", "cluster_rotate"])
def test_without_a_barrier_the_result_depends_on_the_schedule(emulator: ModuleType, kernel: str) -> None:
    """The second barrier holds the fast threads back from overwriting what slow ones still read."""
    blocks, threads, cluster, _ = CORRECT[kernel]
    emulator.disable_barrier(barriers_of(kernel)[1])
    results = set()
    for seed in SCHEDULES:
        emulator.set_schedule(seed)
        results.add(run(emulator, kernel, small_numbers(), blocks, threads, cluster).tobytes())
    assert len(results) > 1


AT = r"block \(\d+, 0, 0\), thread \(\d+, 0, 0\): "
LINE = r"\(emulator/self_test\.cpp:\d+\)"
FAULTS = {
    "read_beyond": r"out-of-bounds read of x\[128\]: x has 128 elements of 4 bytes",
    "read_before": r"out-of-bounds read of x\[-1\]: x has 128 elements of 4 bytes",
    "write_beyond": r"out-of-bounds write of out\[128\]: out has 128 elements of 4 bytes",
    "write_beyond_piece": r"out-of-bounds write of shared memory\[64\]: shared memory has 64 elements",
    "misaligned_load": r"misaligned read of x\[1\] \(4 elements at once\): .* not a multiple of 16 bytes",
    "misaligned_store": r"misaligned write of out\[2\] \(4 elements at once\): .* not a multiple of 16 bytes",
    "uninitialised_shared": r"uninitialised read of shared memory\[\d+\]: .* has 64 elements",
    "uninitialised_output": r"uninitialised read of out\[\d+\]",
    "null_pointer": r"read of a null pointer",
    "foreign_pointer": r"the pointer 'local' does not lie in any tensor",
    "divergent_barrier": rf"divergent barrier: __syncthreads {LINE} while \d+ .* __syncthreads {LINE}",
    "early_exit": rf"divergent barrier: (the thread exited while|__syncthreads {LINE} after 1 thread)",
    "mask_of_exited_lane": r"(the thread exited while lane \d+ waits|the mask names lane 3)",
    "mask_without_self": rf"__ballot_sync {LINE}: the mask does not name the calling lane \d+",
    "shuffle_outside_mask": r"__shfl_sync reads lane 20, which the mask does not name",
    "divergent_warp": rf"divergent warp: __syncwarp {LINE} while lane \d+ waits at __syncwarp {LINE}",
    "read_before_wait": r"read of shared memory\[\d+\] before the async_wait of the copy to it",
    "wait_too_short": r"read of shared memory\[\d+\] before the async_wait of the copy to it",
    "neighbour_has_exited": r"in the shared memory of block [01] of the cluster, which .* has exited",
}


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_caught_and_named(emulator: ModuleType, kernel: str) -> None:
    for seed in SCHEDULES:
        emulator.set_schedule(seed)
        with pytest.raises(emulator.EmulatorError, match=rf"^self_test::{kernel}, {AT}.*{FAULTS[kernel]}"):
            run(
                emulator,
                kernel,
                np.ones(128, np.float32),
                2,
                64,
                2 if kernel == "neighbour_has_exited" else 1,
            )
    # The launch that failed leaves nothing behind.
    np.testing.assert_array_equal(run(emulator, "block_rotate", np.ones(128, np.float32), 2, 64), 16)


def test_a_deadlock_is_reported_by_who_waits_where(emulator: ModuleType) -> None:
    with pytest.raises(emulator.EmulatorError) as error:
        run(emulator, "deadlock", np.ones(32, np.float32), 1, 32)
    message = str(error.value)
    assert message.startswith("self_test::deadlock: deadlock")
    first = r"the first is block \(0, 0, 0\), thread"
    assert re.search(rf"1 thread waits at __syncthreads {LINE}, {first} \(0, 0, 0\)", message)
    assert re.search(rf"31 threads wait at __syncwarp {LINE}, {first} \(1, 0, 0\)", message)


def test_an_output_that_was_not_written_is_named(emulator: ModuleType) -> None:
    with pytest.raises(emulator.EmulatorError, match="never written, the first is element 5"):
        run(emulator, "unwritten_output", np.ones(128, np.float32), 2, 64)


def test_shared_memory_must_suffice(emulator: ModuleType) -> None:
    x = emulator.Tensor(np.ones(64, np.float32), "float32")
    with pytest.raises(
        emulator.EmulatorError, match="overflow: 1 bytes taken after 256, the launch gave 256"
    ):
        emulator.self_test.run("arena_overflow", x, 1, 64, 256, 1)


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        ((1, 1025, 0, 1), "a block of \\(1025, 1, 1\\) threads"),
        ((0, 32, 0, 1), "a grid of \\(0, 1, 1\\) blocks"),
        ((1, 32, 227 * 1024 + 1, 1), "232449 bytes of shared memory"),
        ((4, 32, 0, 3), "clusters of 3 blocks"),
        ((32, 32, 0, 32), "clusters of 32 blocks"),
    ],
)
def test_a_launch_no_device_accepts_is_refused(emulator: ModuleType, launch: tuple, reason: str) -> None:
    with pytest.raises(emulator.EmulatorError, match=f"self_test::votes: invalid launch: {reason}"):
        emulator.self_test.run("votes", emulator.Tensor(np.ones(32, np.float32), "float32"), *launch)


# --- tensors ---


CARRIERS = {
    "float32": "f4",
    "float64": "f8",
    "bfloat16": "u2",
    "float16": "u2",
    "int8": "i1",
    "uint8": "u1",
    "int64": "i8",
    "int32": "i4",
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
    "bool": "?",
}


@pytest.mark.parametrize(("dtype", "carrier"), CARRIERS.items())
def test_tensors_keep_bytes_shape_and_dtype(emulator: ModuleType, dtype: str, carrier: str) -> None:
    array = (np.arange(12) % 2).astype(carrier).reshape(3, 4)
    tensor = emulator.Tensor(array, dtype, offset=1)
    assert (tensor.shape, tensor.dtype, tensor.numpy().dtype) == ((3, 4), dtype, array.dtype)
    np.testing.assert_array_equal(tensor.numpy(), array)


def test_tensors_refuse_what_they_cannot_hold(emulator: ModuleType) -> None:
    with pytest.raises(ValueError, match="8-byte elements is not float32"):
        emulator.Tensor(np.zeros(3), "float32")
    with pytest.raises(ValueError, match="no dtype is named 'float31'"):
        emulator.Tensor(np.zeros(3), "float31")
    with pytest.raises(ValueError, match="C-contiguous"):
        emulator.Tensor(np.zeros((3, 4)).T, "float64")


def test_an_offset_misaligns(emulator: ModuleType) -> None:
    x = emulator.Tensor(np.ones(128, np.float32), "float32", offset=1)
    with pytest.raises(emulator.EmulatorError, match=r"misaligned read of x\[\d+\] \(4 elements at once\)"):
        emulator.self_test.run("vector_double", x, 1, 32, 0, 1)
