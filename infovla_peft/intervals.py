"""Means over runs with their intervals: a percentile bootstrap, and Student's. NumPy only.

Of three values a bootstrap interval is narrower than it ought to be, and of one there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
STUDENT = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604,
    2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555,
    2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom."""


class Estimate(NamedTuple):
    """A mean with its bootstrap interval and its standard error, NaN where there is none, over `n` values.

    `groups` of them are independent of each other, see `bootstrap_mean`.
    """

    mean: float
    low: float
    high: float
    n: int
    error: float = math.nan
    groups: int = 0

    def student(self) -> tuple[float, float]:
        """Student's 95 % interval of the mean: of few groups wider, and truer, than a bootstrap's. NaN with one.

        >>> [round(bound, 2) for bound in bootstrap_mean([1.0, 2.0, 3.0]).student()]
        [-0.48, 4.48]
        """
        half = STUDENT[min(self.groups - 1, len(STUDENT)) - 1] * self.error if self.groups > 1 else math.nan
        return self.mean - half, self.mean + half


def bootstrap_mean(
    values: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The mean of some runs and its percentile bootstrap interval.

    Args:
        values: (runs,), NaN where a run has no value; those are left out.
        groups: (runs,) labels; runs with the same one are drawn together, as they have more in common than chance. The
            standard error is then that of a mean with clusters (CR1, Liang and Zeger 1986). None: each by itself.
        resamples: draws with replacement.
        confidence: in (0, 1).
        seed: of the draws.

    Returns:
        NaN as mean without a value, and as interval with fewer than two groups.

    Raises:
        ValueError: values that are not one-dimensional, another number of groups than of values, no resample, or a
            confidence outside (0, 1).

    Example:
        >>> bootstrap_mean([0.5, 0.5, float("nan")])
        Estimate(mean=0.5, low=0.5, high=0.5, n=2, error=0.0, groups=2)
        >>> bootstrap_mean([0.2, 0.2, 0.5, 0.5], groups=[0, 0, 1, 1])
        Estimate(mean=0.35, low=0.2, high=0.5, n=4, error=0.15, groups=2)
    """
    given = np.asarray(values, dtype=np.float64)
    labels = range(given.size) if groups is None else groups
    if given.ndim != 1 or len(labels) != given.size or resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"expected (runs,) values, as many groups, resamples >= 1 and a confidence in (0, 1), got shape "
            f"{given.shape}, {len(labels)}, {resamples} and {confidence}"
        )
    members: dict[Any, list[float]] = {}
    for label, value in zip(labels, given.tolist(), strict=True):
        if not math.isnan(value):
            members.setdefault(label, []).append(value)
    counts = np.array([len(own) for own in members.values()])
    sums = np.array([math.fsum(own) for own in members.values()])
    runs, number = int(counts.sum()), len(members)
    if not runs:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = round(float(sums.sum() / runs), 12)
    if number == 1:
        return Estimate(mean, math.nan, math.nan, runs, groups=1)
    drawn = np.random.default_rng(seed).integers(number, size=(resamples, number))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)  # (resamples,)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    spread = math.sqrt(number / (number - 1) * float(((sums - counts * mean) ** 2).sum()))
    low, high, error = (round(float(value), 12) for value in (low, high, spread / runs))
    return Estimate(mean, low, high, runs, error, number)


def paired_difference(
    ours: Mapping[Any, float],
    theirs: Mapping[Any, float],
    *,
    groups: Mapping[Any, Any] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The mean difference, ours − theirs, over the pairs of runs that both have, and its paired bootstrap interval.

    A pair shares what a key holds (here seed and order), and is drawn as a whole. A pair with a NaN is left out. Pairs
    of one group (of all keys; here the seed) are drawn together, see `bootstrap_mean`.

    Example: the pairs differ by 0.25 and 0.25, whatever the level of each.

    >>> estimate = paired_difference({0: 0.5, 1: 0.75, 2: 1.0}, {0: 0.25, 1: 0.5})
    >>> estimate
    Estimate(mean=0.25, low=0.25, high=0.25, n=2, error=0.0, groups=2)
    """
    pairs = [key for key in ours if key in theirs]
    differences = [ours[key] - theirs[key] for key in pairs]
    labels = None if groups is None else [groups[key] for key in pairs]
    return bootstrap_mean(differences, groups=labels, resamples=resamples, confidence=confidence, seed=seed)
