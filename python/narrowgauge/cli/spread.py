"""A set of measurements in three numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """The middle of a set of measurements and the range of its inner three fifths."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        median, p20, p80 = np.percentile(np.asarray(samples, dtype=np.float64), [50, 20, 80])
        return cls(float(median), float(p20), float(p80))
