"""What LeRobot keeps of each feature in `meta/stats.json` and of each episode: exact, over every frame."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


class Moments:
    """Count, minimum, maximum, mean and standard deviation of vectors, added block by block; and their quantiles."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.float64]] = []

    def add(self, values: NDArray[Any]) -> None:
        """Args: values (N, D)."""
        self._blocks.append(np.asarray(values, dtype=np.float64))

    def describe(self) -> dict[str, list[Any]]:
        values = np.concatenate(self._blocks)
        simple = {name: getattr(values, name)(axis=0).tolist() for name in ("min", "max", "mean", "std")}
        quantiles = {name: np.quantile(values, share, axis=0).tolist() for name, share in QUANTILES.items()}
        return {**simple, "count": [len(values)], **quantiles}


class ChannelHistogram:
    """The same of the values of uint8 pictures, per channel, in [0, 1] and of shape (3, 1, 1), from exact counts."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)
        self._pictures = 0

    def add(self, pictures: NDArray[np.uint8]) -> None:
        """Args: pictures (N, H, W, 3)."""
        for channel in range(3):
            self._counts[channel] += np.bincount(pictures[..., channel].ravel(), minlength=256)
        self._pictures += len(pictures)

    def merge(self, other: ChannelHistogram) -> None:
        self._counts += other._counts
        self._pictures += other._pictures

    def describe(self) -> dict[str, list[Any]]:
        levels, total = np.arange(256) / 255, self._counts.sum(axis=1)
        mean = self._counts @ levels / total
        below = np.cumsum(self._counts, axis=1)
        found: dict[str, NDArray[np.float64]] = {
            "min": levels[(self._counts > 0).argmax(axis=1)],
            "max": levels[255 - (self._counts[:, ::-1] > 0).argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(self._counts @ levels**2 / total - mean**2, 0)),
        }
        for name, share in QUANTILES.items():
            found[name] = levels[(below >= share * total[:, None]).argmax(axis=1)]
        shaped = {name: value.reshape(3, 1, 1).tolist() for name, value in found.items()}
        return {**shaped, "count": [self._pictures]}
