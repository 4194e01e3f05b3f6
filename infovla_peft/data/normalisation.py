"""Frozen normalisation: LIBERO's actions and proprioception ↔ what the model is trained on.

Statistics have the format of OpenVLA's `dataset_statistics.json`. They are computed once, at the base stage, and never
again: statistics per task destroy a continual policy (93.5 → 23.7 % success is reported).

Two action conventions meet here. LIBERO's: gripper -1 = open, +1 = close. The model's (OpenVLA's): gripper 1 = open,
0 = close. The other dimensions are the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .rows import DemonstrationError

Statistics = Mapping[str, Any]
BOUNDS = {"bounds": ("min", "max"), "bounds_q99": ("q01", "q99")}
"""What becomes -1 and 1, by the model's `action_normalization`."""
COPY_AGAIN = "copy dataset_statistics.json, or the base that has them in its configuration, again"
Array = TypeVar("Array", NDArray[Any], torch.Tensor)


def to_model_action(action: Array) -> Array:
    """LIBERO's action (..., dim), gripper last in [-1, 1] → the model's convention: 1 = open, 0 = close.

    >>> to_model_action(np.array([0.1, -1.0])).tolist(), to_model_action(np.array([0.1, 1.0])).tolist()
    ([0.1, 1.0], [0.1, 0.0])
    """
    gripper = ((1.0 - action[..., -1:]) / 2.0).clip(0.0, 1.0)
    joined: Array = _join(action[..., :-1], gripper)
    return joined


def to_env_action(action: Array) -> Array:
    """The model's un-normalised action (..., dim) → LIBERO's; the gripper becomes -1 (open) or +1 (close).

    >>> to_env_action(np.array([0.1, 0.9])).tolist(), to_env_action(np.array([0.1, 0.5])).tolist()
    ([0.1, -1.0], [0.1, 1.0])
    """
    opens = 2.0 * action[..., -1:] - 1.0 > 0
    gripper = (1 - 2 * opens) if isinstance(opens, torch.Tensor) else np.where(opens, -1, 1)
    joined: Array = _join(action[..., :-1], gripper)
    return joined


def _join(motion: Any, gripper: Any) -> Any:
    if isinstance(motion, torch.Tensor):
        return torch.cat((motion, gripper.to(motion.dtype)), dim=-1)
    return np.concatenate((motion, gripper.astype(motion.dtype)), axis=-1)


_OVERSHOOT, _STILL, _CLOSED = 0.05, 1e-3, 0.5
"""How far a measured gripper may pass its ends, by how much one varies that never moves, and above what it is
closed. Chosen, not measured: LIBERO's is at -1 or +1."""


def check_gripper(actions: NDArray[Any]) -> None:
    """Refuse actions (N, A) whose gripper cannot be in LIBERO's convention.

    That is, it leaves [-1, 1], or moves, never goes below 0 and does not stay closed: what has 1 = open and
    0 = closed, as the model, would be learned as closed throughout. One that never moves, or stays above 0.5, passes:
    a task may need no more than a closed hand, and a robot may have none.

    Raises:
        DemonstrationError: with the ways to convert them.

    >>> check_gripper(np.array([[0.1, -1.0], [0.1, 1.0]]))
    """
    low, high = float(actions[:, -1].min()), float(actions[:, -1].max())
    never_opens = -_OVERSHOOT < low < _CLOSED and high - low > _STILL
    if never_opens or low < -1 - _OVERSHOOT or high > 1 + _OVERSHOOT:
        raise DemonstrationError(
            f"the gripper, the last number of an action, goes from {low:g} to {high:g} as it was read; it must be -1 "
            "for open and +1 for closed. Say what stands for open and for closed in these demonstrations, in place of "
            "a `gripper` that was given: "
            f"load_demonstrations(..., gripper=({high:g}, {low:g})), in a recipe demonstrations_gripper: [{high:g}, "
            f"{low:g}], if {high:g} is open, the other way round if it is closed; or convert the rows by frames.map"
        )


def compute_statistics(actions: ArrayLike, states: ArrayLike, trajectories: int) -> dict[str, Any]:
    """Statistics of demonstrations, in OpenVLA's format.

    Args:
        actions: (N, 7), LIBERO's convention.
        states: (N, 8), proprioception.
        trajectories: number of episodes.

    Returns:
        {"action": {mean, std, min, max, q01, q99, mask}, "proprio": the same without mask, "num_transitions",
        "num_trajectories"}, plain lists and numbers. Those of the action are of the model's convention; its mask is
        False for the gripper, which is left as it is.

    Raises:
        ValueError: no frames, shapes that are no matrices of equal length, or values that are not finite.
    """
    action, state = np.asarray(actions, dtype=np.float64), np.asarray(states, dtype=np.float64)
    if action.ndim != 2 or state.ndim != 2 or len(action) != len(state) or not len(action):
        raise ValueError(f"expected actions (N, A) and states (N, P), N ≥ 1, got {action.shape} and {state.shape}")
    if not (np.isfinite(action).all() and np.isfinite(state).all()):
        raise ValueError("the demonstrations hold NaN or infinite actions or states; record them again")
    mask = [True] * (action.shape[1] - 1) + [False]
    return {
        "action": {**_describe(to_model_action(action)), "mask": mask},
        "proprio": _describe(state),
        "num_transitions": len(action),
        "num_trajectories": trajectories,
    }


def _describe(values: NDArray[np.float64]) -> dict[str, list[float]]:
    q01, q99 = np.quantile(values, (0.01, 0.99), axis=0)
    simple = {name: getattr(values, name)(axis=0) for name in ("mean", "std", "min", "max")}
    return {name: value.tolist() for name, value in {**simple, "q01": q01, "q99": q99}.items()}


class UnknownStatisticsError(KeyError, ValueError):
    """There are no statistics of the data set that was asked for; the message names those that there are."""

    def __str__(self) -> str:  # KeyError's own would be the repr of the message
        return str(self.args[0])


class Normaliser:
    """Maps the 1st and 99th percentile to -1 and 1; what the mask leaves out (the gripper) passes unchanged.

    NumPy arrays and tensors alike, any number of leading dimensions. A dimension that never varied normalises to 0.

    Args:
        statistics: {key: statistics of one data set}, as in `dataset_statistics.json` or `config.norm_stats`.
        key: which data set; may be None where there is only one. `X` also finds `X_no_noops`.
        bounds: the model's `config.action_normalization`: `bounds_q99`, or `bounds` for minimum and maximum.

    Raises:
        UnknownStatisticsError: no such key, or None although there are several.
        ValueError: the statistics lack numbers, or their lengths differ.
    """

    def __init__(self, statistics: Statistics, key: str | None = None, *, bounds: str = "bounds_q99") -> None:
        self.key = find_key(statistics, key)
        self.statistics: dict[str, Any] = dict(statistics[self.key])
        action, proprio = self.statistics.get("action") or {}, self.statistics.get("proprio")
        self._action = _bounds(action, bounds)
        self._mask = np.asarray(action.get("mask", [True] * len(self._action[0])), dtype=bool)
        if self._mask.shape != self._action[0].shape:
            raise ValueError(f"the statistics of {self.key!r} have a mask of another length; {COPY_AGAIN}")
        self._proprio = _bounds(proprio, bounds) if proprio else None

    @property
    def action_dim(self) -> int:
        return len(self._mask)

    @property
    def proprio_dim(self) -> int:
        """0 where the statistics have none."""
        return len(self._proprio[0]) if self._proprio else 0

    def normalise_actions(self, actions: Array) -> Array:
        """The model's un-normalised actions (..., A) → [-1, 1], clipped; the gripper stays in [0, 1]."""
        return _where(self._mask, _normalise(actions, self._action), actions)

    def unnormalise_actions(self, actions: Array) -> Array:
        """The inverse of `normalise_actions`, up to its clipping."""
        return _where(self._mask, _unnormalise(actions, self._action), actions)

    def normalise_proprio(self, state: Array) -> Array:
        """Proprioception (..., P) → [-1, 1], clipped."""
        return _normalise(state, self._need_proprio())

    def unnormalise_proprio(self, state: Array) -> Array:
        return _unnormalise(state, self._need_proprio())

    def to_env_action(self, actions: Array) -> Array:
        """What `policy.act` returns (..., A) → LIBERO's actions."""
        return to_env_action(actions)

    def as_statistics(self) -> dict[str, Any]:
        """{key: statistics}, what is saved with an adapter."""
        return {self.key: self.statistics}

    def _need_proprio(self) -> tuple[NDArray[Any], NDArray[Any]]:
        if self._proprio is None:
            raise ValueError(
                f"the statistics of {self.key!r} have no proprioception; this base was trained without it, "
                "so use it without (proprio_dim = 0)"
            )
        return self._proprio


def find_key(statistics: Statistics, key: str | None) -> str:
    """The name under which `Normaliser` finds the statistics of a data set; the same arguments and errors."""
    if not statistics:
        raise UnknownStatisticsError("the base model has no action statistics (norm_stats, dataset_statistics.json)")
    if key is None and len(statistics) == 1:
        return next(iter(statistics))
    for candidate in (key, f"{key}_no_noops"):
        if candidate in statistics:
            return str(candidate)
    near = difflib.get_close_matches(str(key), statistics, n=5, cutoff=0.3) or sorted(statistics)[:5]
    asked = "several data sets have statistics here" if key is None else f"no statistics for {key!r}"
    raise UnknownStatisticsError(f"{asked}; set unnorm_key to one of: {', '.join(near)}")


def _bounds(described: Mapping[str, Any], bounds: str) -> tuple[NDArray[Any], NDArray[Any]]:
    found = [np.asarray(described.get(name, ()), dtype=np.float64) for name in BOUNDS[bounds]]
    if found[0].ndim != 1 or not len(found[0]) or found[0].shape != found[1].shape:
        raise ValueError(
            f"the statistics have {BOUNDS[bounds][0]} and {BOUNDS[bounds][1]} of shapes {found[0].shape} and "
            f"{found[1].shape}; they must be lists of the same length: {COPY_AGAIN}"
        )
    return found[0], found[1]


def _like(values: Array, constant: NDArray[Any]) -> Array:
    moved: Any = torch.as_tensor(constant, device=values.device) if isinstance(values, torch.Tensor) else constant
    return moved  # type: ignore[no-any-return]


def _normalise(values: Array, bounds: tuple[NDArray[Any], NDArray[Any]]) -> Array:
    span = bounds[1] - bounds[0]
    scale, varies = _like(values, np.where(span > 0, span, 1.0)), _like(values, span > 0)
    normalised: Array = _cast(
        (2.0 * (values - _like(values, bounds[0])) / scale - 1.0).clip(-1.0, 1.0) * varies, values
    )
    return normalised


def _unnormalise(values: Array, bounds: tuple[NDArray[Any], NDArray[Any]]) -> Array:
    low, high = (_like(values, bound) for bound in bounds)
    raw: Array = _cast(0.5 * (values + 1.0) * (high - low) + low, values)
    return raw


def _where(mask: NDArray[Any], one: Array, other: Array) -> Array:
    if isinstance(one, torch.Tensor):
        return torch.where(torch.as_tensor(mask, device=one.device), one, other)
    return np.where(mask, one, other)


def _cast(values: Any, like: Any) -> Any:
    return values.to(like.dtype) if isinstance(values, torch.Tensor) else values.astype(like.dtype)
