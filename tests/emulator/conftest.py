from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from tests.emulator.loading import load_emulator


@pytest.fixture
def emulator() -> Iterator[ModuleType]:
    module = load_emulator()
    module.set_schedule(0)
    yield module
    module.disable_barrier(None)
