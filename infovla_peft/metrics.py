"""Metrics of continual learning, computed from a success matrix. NumPy only.

``success[i, j]`` is the success rate on task *i* after stage *j*: a float array of shape (tasks, stages), in [0, 1]
(or in per cent: every metric has the unit of its input), NaN where nothing was evaluated. ``learned_at[i]`` is the
stage at which task *i* is learned, an int array of shape (tasks,); it defaults to ``0, 1, 2 …``, one task per stage. A
base stage of several tasks is several rows with ``learned_at`` 0, and every *task* then has the same weight.

Common rules:

- A cell left of ``learned_at`` (before the task was learned) enters no metric.
- A NaN cell is left out of its mean, and a mean over nothing is NaN. With no NaN, the formulae are the paper's.
- A task with ``learned_at`` beyond the last column is not learned yet and enters no metric: an unfinished run may be
  measured.
- No metric changes its arguments. ``ValueError`` is raised for a matrix that is not 2-D or has no column, for infinite
  cells, and for a ``learned_at`` that is not one stage ≥ 0 per task.

The examples below all use this matrix: three tasks, learned one after the other.

>>> success = np.array([[1.0, 0.5, 0.3],
...                     [0.0, 0.8, 0.6],
...                     [0.0, 0.2, 0.9]])

The paper (arXiv 2603.13335) writes the means over *i* with N, its number of stages; where its base stage holds five
tasks this may mean five rows or one. Its stage table settles it for two metrics: AA is the mean, and FAA the last, of
the per-stage averages over all *tasks* seen, so we weigh tasks. `average_groups` gives the other reading.

The paper's own table cannot be of one task set: with n_i stages after task i is learned,

    FWT − AUC = mean_i n_i / (n_i + 1) · NBT_i

holds exactly, and its rows with AUC far below FWT beside NBT < 0 would need success rates above 100 %. Its FWT is the
mean over the incremental tasks only: ``forward_transfer(success[5:], learned_at[5:])`` for five base tasks.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def masked_mean(values: FloatArray, keep: BoolArray | None = None, axis: int | None = None) -> FloatArray:
    """Mean over the kept cells (None: all) that are not NaN; NaN, without a warning, where there are none.

    >>> masked_mean(np.array([[1.0, np.nan], [3.0, np.nan]]), axis=0)
    array([ 2., nan])
    """
    keep = ~np.isnan(values) if keep is None else keep & ~np.isnan(values)
    count = keep.sum(axis=axis)
    total = np.where(keep, values, 0.0).sum(axis=axis)
    mean: FloatArray = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean


def _mean_of(values: FloatArray) -> float:
    return float(masked_mean(values))


def _prepare(success: ArrayLike, learned_at: ArrayLike | None) -> tuple[FloatArray, NDArray[np.int64], BoolArray]:
    """The tasks learned so far: cells (tasks, stages), stage (tasks,), and the mask of j ≥ learned_at."""
    matrix = np.asarray(success, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"success must have the shape (tasks, stages) with at least one stage, got {matrix.shape}")
    if np.isinf(matrix).any():
        raise ValueError("success holds infinite cells; use NaN for a cell that was not evaluated")
    tasks, stages = matrix.shape
    stage_of = np.arange(tasks) if learned_at is None else np.asarray(learned_at)
    if stage_of.shape != (tasks,) or not np.issubdtype(stage_of.dtype, np.integer) or (stage_of < 0).any():
        raise ValueError(f"learned_at must be one integer stage >= 0 for each of the {tasks} tasks, got {stage_of!r}")
    learned = stage_of < stages
    matrix, stage_of = matrix[learned], stage_of[learned].astype(np.int64)
    return matrix, stage_of, np.arange(stages) >= stage_of[:, None]


def _when_learned(matrix: FloatArray, stage_of: NDArray[np.int64]) -> FloatArray:
    diagonal: FloatArray = matrix[np.arange(len(matrix)), stage_of]  # (tasks,)
    return diagonal


def auc(success: ArrayLike, learned_at: ArrayLike | None = None) -> float:
    """Area under the success curve, the mean over each task's life: AUC = mean_i mean_{j ≥ i} R[i, j].

    Example: task 0 has (1.0 + 0.5 + 0.3) / 3 = 0.6, task 1 (0.8 + 0.6) / 2 = 0.7, task 2 0.9; their mean is 0.7333.

    >>> round(auc([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]]), 4)
    0.7333
    """
    matrix, _, alive = _prepare(success, learned_at)
    return _mean_of(masked_mean(matrix, alive, axis=1))


def forward_transfer(success: ArrayLike, learned_at: ArrayLike | None = None) -> float:
    """Success right after learning, the paper's FWT = mean_i R[i, i].

    LIBERO's "FWT" is another thing, an average over the epochs of a stage; and the forward transfer of Lopez-Paz &
    Ranzato looks at tasks *before* they are learned.

    Example: (1.0 + 0.8 + 0.9) / 3 = 0.9.

    >>> round(forward_transfer([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]]), 4)
    0.9
    """
    matrix, stage_of, _ = _prepare(success, learned_at)
    return _mean_of(_when_learned(matrix, stage_of))


def negative_backward_transfer(success: ArrayLike, learned_at: ArrayLike | None = None) -> float:
    """What a task loses after it was learned (lower is better): NBT = mean_{i < N} mean_{j > i} (R[i, i] − R[i, j]).

    Tasks of the last stage have no later one and are left out.

    Example: task 0 loses (0.5 + 0.7) / 2 = 0.6, task 1 loses 0.2; their mean is 0.4.

    >>> round(negative_backward_transfer([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]]), 4)
    0.4
    """
    matrix, stage_of, alive = _prepare(success, learned_at)
    later = alive & (np.arange(matrix.shape[1]) > stage_of[:, None])
    return _mean_of(masked_mean(_when_learned(matrix, stage_of)[:, None] - matrix, later, axis=1))


def final_average(success: ArrayLike, learned_at: ArrayLike | None = None) -> float:
    """Final average accuracy, over all tasks after the last stage: FAA = mean_i R[i, N].

    Example: (0.3 + 0.6 + 0.9) / 3 = 0.6.

    >>> round(final_average([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]]), 4)
    0.6
    """
    matrix, _, _ = _prepare(success, learned_at)
    return _mean_of(matrix[:, -1])


def average_by_stage(success: ArrayLike, learned_at: ArrayLike | None = None, *, old_only: bool = False) -> FloatArray:
    """The paper's "All" (or, with `old_only`, "Old") of each stage j: the mean of R[i, j] over i ≤ j (or i < j).

    Returns:
        float64 array of shape (stages,); "Old" of stage 0 is NaN.

    Example: after stage 1 the tasks 0 and 1 have (0.5 + 0.8) / 2 = 0.65, of which only task 0 is old.

    >>> average_by_stage([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]]).round(4).tolist()
    [1.0, 0.65, 0.6]
    >>> average_by_stage([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]], old_only=True).round(4).tolist()
    [nan, 0.5, 0.45]
    """
    matrix, stage_of, alive = _prepare(success, learned_at)
    if old_only:
        alive = alive & (np.arange(matrix.shape[1]) > stage_of[:, None])
    return masked_mean(matrix, alive, axis=0)


def average_accuracy(success: ArrayLike, learned_at: ArrayLike | None = None) -> float:
    """Average accuracy over the run: AA = mean_j mean_{i ≤ j} R[i, j].

    Example: the stages have 1.0, (0.5 + 0.8) / 2 = 0.65 and (0.3 + 0.6 + 0.9) / 3 = 0.6; their mean is 0.75.

    >>> round(average_accuracy([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]]), 4)
    0.75
    """
    return _mean_of(average_by_stage(success, learned_at))


def forgetting(success: ArrayLike, learned_at: ArrayLike | None = None) -> float:
    """Loss against the best earlier stage (lower is better): F = mean_{i < N} (max_{i ≤ j < N} R[i, j] − R[i, N]).

    After Chaudhry et al. (1801.10112), not a metric of the paper. Tasks of the last stage are left out.

    Example: task 0 falls from 1.0 to 0.3, task 1 from 0.8 to 0.6; the mean of 0.7 and 0.2 is 0.45.

    >>> round(forgetting([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]]), 4)
    0.45
    """
    matrix, _, alive = _prepare(success, learned_at)
    earlier = np.where(alive[:, :-1] & ~np.isnan(matrix[:, :-1]), matrix[:, :-1], -np.inf)
    best = earlier.max(axis=1, initial=-np.inf)  # (tasks,)
    return _mean_of(np.where(np.isfinite(best), best, np.nan) - matrix[:, -1])


def backward_transfer(success: ArrayLike, learned_at: ArrayLike | None = None) -> float:
    """Change until the end (higher is better; negative is forgetting): BWT = mean_{i < N} (R[i, N] − R[i, i]).

    After Lopez-Paz & Ranzato (1706.08840), not a metric of the paper. Tasks of the last stage are left out.

    Example: task 0 changes by 0.3 − 1.0, task 1 by 0.6 − 0.8; the mean of −0.7 and −0.2 is −0.45.

    >>> round(backward_transfer([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]]), 4)
    -0.45
    """
    matrix, stage_of, _ = _prepare(success, learned_at)
    change = matrix[:, -1] - _when_learned(matrix, stage_of)
    return float(masked_mean(change, stage_of < matrix.shape[1] - 1))


def all_metrics(success: ArrayLike, learned_at: ArrayLike | None = None) -> dict[str, float]:
    """The seven metrics by name.

    >>> metrics = all_metrics([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]])
    >>> {name: round(value, 4) for name, value in metrics.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'auc': 0.7333, 'forward_transfer': 0.9, 'negative_backward_transfer': 0.4, 'final_average': 0.6,
     'average_accuracy': 0.75, 'forgetting': 0.45, 'backward_transfer': -0.45}
    """
    metrics = (
        auc,
        forward_transfer,
        negative_backward_transfer,
        final_average,
        average_accuracy,
        forgetting,
        backward_transfer,
    )
    return {metric.__name__: metric(success, learned_at) for metric in metrics}


def average_groups(success: ArrayLike, learned_at: ArrayLike) -> tuple[FloatArray, NDArray[np.int64]]:
    """One row per stage instead of one per task: the mean over the tasks learned at that stage.

    Returns:
        The grouped matrix (groups, stages) and its `learned_at` (groups,), ready for every metric above. A base stage
        of five tasks then weighs as much as one later task.

    Example: tasks 0 and 1 form the base.

    >>> grouped, stages = average_groups([[1.0, 0.5], [0.8, 0.7], [0.0, 0.9]], [0, 0, 1])
    >>> grouped.round(4).tolist(), stages.tolist()
    ([[0.9, 0.6], [0.0, 0.9]], [0, 1])
    """
    matrix, stage_of, _ = _prepare(success, learned_at)
    groups = np.unique(stage_of)
    rows = [
        masked_mean(matrix, np.broadcast_to((stage_of == group)[:, None], matrix.shape), axis=0) for group in groups
    ]
    return np.array(rows, dtype=np.float64).reshape(len(groups), matrix.shape[1]), groups


def wilson_interval(
    successes: ArrayLike, episodes: ArrayLike, *, confidence: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Wilson's score interval of a success rate, which stays within [0, 1] and is honest at 0 and 100 %.

        centre ± width,  centre = (p + z²/2n) / (1 + z²/n),  width = z / (1 + z²/n) · √(p(1 − p)/n + z²/4n²)

    Args:
        successes: count of successes, any shape.
        episodes: count of episodes, same shape; where it is 0, both bounds are NaN.
        confidence: in (0, 1).

    Returns:
        Lower and upper bound, float64 arrays of the shape of the input.

    Raises:
        ValueError: counts that are not 0 ≤ successes ≤ episodes, or a confidence outside (0, 1).

    Example: 15 of 20 is 75 %, and anything from 53 % to 89 % is compatible with it.

    >>> low, high = wilson_interval(15, 20)
    >>> round(float(low), 4), round(float(high), 4)
    (0.5313, 0.8881)
    """
    count, total = np.asarray(successes, dtype=np.float64), np.asarray(episodes, dtype=np.float64)
    if not ((count >= 0) & (count <= total)).all():
        raise ValueError(f"expected 0 <= successes <= episodes, got {successes!r} of {episodes!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    n = np.where(total > 0, total, np.nan)
    rate, shrink = count / n, 1 + z**2 / n
    centre = (rate + z**2 / (2 * n)) / shrink
    width = z / shrink * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # At 0 and at 100 % one bound is exact; rounding must not move it.
    low: Any = np.where(rate == 0, 0.0, centre - width)
    high: Any = np.where(rate == 1, 1.0, centre + width)
    return low, high
