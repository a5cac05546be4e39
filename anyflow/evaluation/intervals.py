"""95 % intervals of few values: of a mean (Student's t) and of a share (Wilson's score)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def t_quantile(freedom: float) -> float:
    """How many standard errors the 95 % interval of a mean reaches to each side."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of independent values (Student's t); at least two of them."""
    return t_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share seen in ``count`` trials; it stays within 0 and 1 at any count."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
