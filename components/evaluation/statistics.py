"""Wilson's interval and McNemar's exact test.

scipy.stats has both, but it takes seconds to import.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion (Wilson 1927); (0, 1) if n is 0.

    Raises:
        ValueError: successes outside 0..n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} is not in 0..{n}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At the ends the bound is exactly 0 or 1. Rounding would miss it.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def mcnemar(correct_a: np.ndarray[Any, Any], correct_b: np.ndarray[Any, Any]) -> float:
    """Return the exact two-sided p-value that two models are equally accurate.

    Args:
        correct_a: bool [N], whether the first model is right about each sample.
        correct_b: bool [N], the same of the second model, with the same samples in the same order.

    Raises:
        ValueError: the arrays differ in shape or are not bool.
    """
    if correct_a.shape != correct_b.shape or correct_a.dtype != bool or correct_b.dtype != bool:
        raise ValueError(
            f"two bool arrays of one shape are needed, got {correct_a.dtype} {correct_a.shape} "
            f"and {correct_b.dtype} {correct_b.shape}"
        )
    return sign_test(int((correct_a & ~correct_b).sum()), int((~correct_a & correct_b).sum()))


def sign_test(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value that a sample is as likely to favour one model as the other.

    Args:
        only_a: number of samples about which only the first model is right.
        only_b: number of samples about which only the second model is right.
    """
    n = only_a + only_b
    # Sum the binomial tail in exact integers: floats would underflow beyond n = 1074.
    tail = term = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return float(min(1.0, 2 * tail / 2**n))
