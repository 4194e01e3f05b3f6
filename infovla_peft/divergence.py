"""A training that has run away: found before its weights are touched, with the batch in which it happened."""

from __future__ import annotations

import math

import numpy as np

from .data.sampling import Draw, ReplayMixture


class DivergenceError(RuntimeError):
    """The loss or the gradient is not finite, or the gradient exceeds its limit; the message names step and batch."""


def describe_batch(mixture: ReplayMixture, draw: Draw) -> str:
    """The frames of a batch: tasks, their demonstrations (numbered over the data) and frame numbers."""
    parts, first = [], 0
    tables = [(mixture.current, draw.current)]
    for table in mixture.replayed:
        rows = draw.replay.own[:, 1] - first
        tables.append((table, rows[(rows >= 0) & (rows < len(table))]))
        first += len(table)
    for number, (table, rows) in enumerate(tables):
        for task, trajectory in dict.fromkeys(zip(table.task[rows], table.trajectory[rows], strict=True)):
            chosen = rows[(table.task[rows] == task) & (table.trajectory[rows] == trajectory)]
            frames = ", ".join(str(frame) for frame in np.sort(table.frame[chosen]))
            where = "replayed " if number else ""
            parts.append(f"{where}{table.tasks[task]}, demonstration {trajectory}: frames {frames}")
    return "; ".join(parts)


def divergence_reason(loss: float, gradient_norm: float | None, limit: float, *, scaled: bool) -> str | None:
    """What is wrong with a step, None if nothing is.

    Args:
        loss: of this process's last batch.
        gradient_norm: over all parameters, before clipping; None if it is not known.
        limit: of the norm.
        scaled: gradients are scaled (fp16), where an overflow is normal and the step is skipped.

    >>> divergence_reason(float("nan"), 1.0, 1e6, scaled=False)
    'the loss is nan'
    >>> divergence_reason(0.5, 2e6, 1e6, scaled=False)
    'the norm of the gradient is 2e+06, above grad_norm_limit (1e+06)'
    """
    if not math.isfinite(loss):
        return f"the loss is {loss:g}"
    if scaled or gradient_norm is None or gradient_norm <= limit:
        return None
    return f"the norm of the gradient is {gradient_norm:.3g}, above grad_norm_limit ({limit:g})"
