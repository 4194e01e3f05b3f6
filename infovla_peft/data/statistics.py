"""The base's frozen statistics, with room for the tasks to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .normalisation import compute_statistics

if TYPE_CHECKING:
    import datasets


def statistics_of(frames: datasets.Dataset) -> dict[str, Any]:
    """Frozen normalisation out of the base tasks' demonstrations, with room for the tasks to come.

    What lies outside of q01 … q99 is clipped for ever, and a later task may need it: on LIBERO-Goal the hand turns by
    up to 0.1 of its range in "put the bowl on the stove" and by 0.8 in "turn on the stove". So the bounds of actions
    are the controller's own, [-1, 1], and those of proprioception are moved outwards by half their distance. (OpenVLA
    takes the percentiles, of a data set that holds all tasks.) Mean, std, min and max are as measured.
    """
    columns = frames.select_columns(["action", "state", "task", "episode_index"]).with_format("numpy")[:]
    episodes = len(set(zip(columns["task"], columns["episode_index"].tolist(), strict=True)))
    statistics = compute_statistics(np.stack(columns["action"]), np.stack(columns["state"]), episodes)
    action, proprio = statistics["action"], statistics["proprio"]
    for position, moves in enumerate(action["mask"]):
        if moves:
            action["q01"][position], action["q99"][position] = -1.0, 1.0
    low, high = np.array(proprio["q01"]), np.array(proprio["q99"])
    proprio["q01"], proprio["q99"] = (low - (high - low) / 2).tolist(), (high + (high - low) / 2).tolist()
    return statistics
