"""Two gloo processes that run checks by name.

A test file starts itself twice as a program and names one check after another to both; they live as long as checks
pass, because starting PyTorch takes longer than any check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
PROCESSES = 2
COLLECTIVE_TIMEOUT = timedelta(seconds=20)
CHECK_TIMEOUT = 60.0


def serve(checks: dict[str, Callable[[], None]]) -> None:
    """One process: reads names of checks, answers each with an empty string or a traceback."""
    rank, folder = int(sys.argv[1]), sys.argv[2]
    answers, sys.stdout = sys.stdout, sys.stderr
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=COLLECTIVE_TIMEOUT,
    )
    for line in sys.stdin:
        try:
            checks[line.rstrip(chr(10))]()
            answer = ""
        except BaseException:  # DCP's exception is not an Exception
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)
    dist.destroy_process_group()


class Processes:
    """The processes that run checks. After a failed check they may disagree, so new ones are started."""

    def __init__(self, program: str, folder: Path):
        self.program, self.folder, self.started = program, folder, 0
        self.running: list[subprocess.Popen[str]] = []

    def run(self, name: str) -> None:
        """Runs a check in all; fails with what each of them said."""
        if not self.running:
            self._start()
        timer = threading.Timer(CHECK_TIMEOUT, self._kill)
        timer.start()
        try:
            for process in self.running:
                print(name, file=process.stdin, flush=True)
            lines = [process.stdout.readline() for process in self.running]
        finally:
            timer.cancel()
        answers = [json.loads(line) if line else "the process ended or hung" for line in lines]
        if any(answers):
            self.stop()
        assert not any(answers), "\n".join(f"process {rank}:\n{text}" for rank, text in enumerate(answers))

    def _start(self) -> None:
        self.started += 1
        folder = self.folder / str(self.started)
        folder.mkdir()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.running = [
            subprocess.Popen(
                [sys.executable, self.program, str(rank), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank in range(PROCESSES)
        ]

    def _kill(self) -> None:
        for process in self.running:
            process.kill()

    def stop(self) -> None:
        for process in self.running:
            process.stdin.close()
        for process in self.running:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self.running = []


def processes_of(program: str) -> Any:
    """The fixture of a test file."""

    @pytest.fixture(scope="module", name="processes")
    def fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
        processes = Processes(program, tmp_path_factory.mktemp("processes"))
        yield processes
        processes.stop()

    return fixture
