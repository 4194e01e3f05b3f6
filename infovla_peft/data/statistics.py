"""The base's frozen statistics, with room for the tasks to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .normalisation import check_gripper, compute_statistics
from .rows import check_table

if TYPE_CHECKING:
    import datasets


def statistics_of(frames: datasets.Dataset) -> dict[str, Any]:
    """Frozen normalisation out of the base tasks' demonstrations, with room for the tasks to come.

    What lies outside of q01 … q99 is clipped for ever, and a later task may need it: on LIBERO-Goal the hand turns by
    up to 0.1 of its range in "put the bowl on the stove" and by 0.8 in "turn on the stove". So the bounds of actions
    are the controller's own, [-1, 1], and those of proprioception are moved outwards by half their distance. (OpenVLA
    takes the percentiles, of a data set that holds all tasks.) Mean, std, min and max are as measured.

    Actions of another controller, which leave [-1, 1] or use less than a tenth of it in every dimension (metres and
    radians, say), have bounds as proprioception has: their own, moved outwards.

    Raises:
        ValueError: `frames` is a stream.
        DemonstrationError: the gripper is in another convention than LIBERO's, see `normalisation.check_gripper`.
    """
    check_table(frames)
    columns = frames.select_columns(["action", "state", "task", "episode_index"]).with_format("numpy")[:]
    episodes = len(set(zip(columns["task"], columns["episode_index"].tolist(), strict=True)))
    actions = np.stack(columns["action"])
    check_gripper(actions)
    statistics = compute_statistics(actions, np.stack(columns["state"]), episodes)
    action, proprio = statistics["action"], statistics["proprio"]
    moves = np.array(action["mask"])
    reach = np.abs([action["min"], action["max"]])[:, moves].max()
    low, high = (
        _outwards(action)
        if reach > 1 + _ROUNDING or reach < _LITTLE
        else (-np.ones(moves.shape), np.ones(moves.shape))
    )
    action["q01"] = np.where(moves, low, action["q01"]).tolist()
    action["q99"] = np.where(moves, high, action["q99"]).tolist()
    proprio["q01"], proprio["q99"] = (bound.tolist() for bound in _outwards(proprio))
    return statistics


_ROUNDING, _LITTLE = 1e-3, 0.1


def _outwards(described: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = np.array(described["q01"]), np.array(described["q99"])
    return low - (high - low) / 2, high + (high - low) / 2
