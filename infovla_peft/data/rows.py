"""A demonstration as rows, one per frame: columns and their types, checks, and the options that change rows.

What every reader gives, whatever lay on the disk:

    image, wrist_image   upright RGB; a reader may have others, by any name
    state                float32 (8,): hand position (m), its rotation as axis times angle (rad), fingers (m)
    action               float32 (7,): LIBERO's convention (six deltas in [-1, 1], gripper -1 open, +1 closed)
    instruction, task, suite, episode_index, frame_index
    done                 the last row of its episode
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    import datasets

CAMERA_COLUMNS: Mapping[str, str] = {"agentview": "image", "robot0_eye_in_hand": "wrist_image"}
MADE_COLUMNS = frozenset({"instruction", "task", "suite", "episode_index", "frame_index", "done"})
STATE_DIM, ACTION_DIM = 8, 7
NOOP_THRESHOLD = 1e-4
"""Norm of the six deltas below which OpenVLA's `regenerate_libero_dataset.py` takes an action for none."""

MOST_PIXELS = 1 << 24
"""Of one picture; a camera of a robot has a tenth of it."""


class DemonstrationError(ValueError):
    """A set of demonstrations cannot be used; the message names the file and the cure."""


@dataclass(frozen=True)
class Episode:
    """One demonstration as it was read.

    Attributes:
        source: where it lies, for messages.
        images: column -> T pictures, each a uint8 array (H, W, 3) or {"bytes": encoded, "path": None}.
        columns: further columns, T values each, among them `state` (T, P) and `action` (T, A).
        values: further columns with the same value in every row, such as `instruction` and `task`.
    """

    source: str
    images: Mapping[str, Any]
    columns: Mapping[str, Any]
    values: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.columns["action"])


ROWS_VERSION = 1
"""Raised whenever rows of the same files come out otherwise, here or in a reader: none prepared before are taken."""


@dataclass(frozen=True)
class RowOptions:
    """What is done to the rows of every episode, see `load_demonstrations`.

    Raises:
        ValueError: `gripper` is not two different numbers.
    """

    rotate: bool = False
    drop_noops: bool = False
    action_dim: int = ACTION_DIM
    state_dim: int = STATE_DIM
    gripper: tuple[float, float] | None = None
    version: int = ROWS_VERSION

    def __post_init__(self) -> None:
        if self.gripper is not None and not (
            len(self.gripper) == 2 and np.isfinite(self.gripper).all() and self.gripper[0] != self.gripper[1]
        ):
            raise ValueError(
                f"gripper is two different numbers, what stands for open and for closed, as (1, 0), not {self.gripper}"
            )


def frame_features(
    images: Sequence[str], *, state_dim: int = STATE_DIM, action_dim: int = ACTION_DIM
) -> datasets.Features:
    """Column types of the rows, for these image columns."""
    import datasets

    return datasets.Features(
        {name: datasets.Image() for name in images}
        | {"state": datasets.List(datasets.Value("float32"), state_dim)}
        | {"action": datasets.List(datasets.Value("float32"), action_dim)}
        | {name: datasets.Value("string") for name in ("instruction", "task", "suite")}
        | {name: datasets.Value("int64") for name in ("episode_index", "frame_index")}
        | {"done": datasets.Value("bool")}
    )


def check_episode_values(episode: Episode, options: RowOptions) -> None:
    """Refuse what cannot be learned from.

    Raises:
        DemonstrationError: no frames, columns of different lengths, other dimensions than wanted, NaN or infinity.
    """
    frames = len(episode)
    if not frames:
        raise DemonstrationError(f"{episode.source} holds no frames: leave it out")
    for name, column in (*episode.columns.items(), *episode.images.items()):
        if len(column) != frames:
            raise DemonstrationError(
                f"{episode.source}: {name} has {len(column)} frames, action has {frames}; the file is damaged, or "
                "`columns` names things that do not belong together"
            )
    for name, wanted in (("action", options.action_dim), ("state", options.state_dim)):
        values = np.asarray(episode.columns[name])
        check_dimension(episode.source, name, values.shape[1] if values.ndim == 2 else 1, wanted)
        if not np.isfinite(values.astype(np.float64)).all():
            row = int(np.argwhere(~np.isfinite(values.astype(np.float64)))[0][0])
            raise DemonstrationError(
                f"{episode.source}: {name} holds NaN or infinite values (first in frame {row}); leave the episode "
                "out, or get the file again"
            )


def check_dimension(source: str, name: str, found: int, wanted: int) -> None:
    """Refuse actions or states of another size.

    Raises:
        DemonstrationError: with the way to ask for that size.
    """
    if found != wanted:
        meaning = {
            "action": "LIBERO's seven numbers are six OSC_POSE deltas and the gripper",
            "state": "LIBERO's eight numbers are hand position, axis-angle and fingers",
        }[name]
        raise DemonstrationError(
            f"{source}: {name} has {found} dimensions, not {wanted} ({meaning}); name the right columns with "
            f"`columns`, or pass {name}_dim={found} for another robot"
        )


def noops(actions: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which actions (T, A) do nothing: no motion, and the gripper's command as in the last action that was kept.

    OpenVLA's rule. Deviation: it replays what is left in the simulator and records anew; here rows are left out, so
    that the frames are those of the original recording.

    >>> noops(np.array([[0, 0, 0, 0, 0, 0, -1], [1, 0, 0, 0, 0, 0, -1], [0, 0, 0, 0, 0, 0, 1.0]])).tolist()
    [True, False, False]
    """
    still = np.linalg.norm(actions[:, :-1], axis=1) < NOOP_THRESHOLD
    dropped = np.zeros(len(actions), dtype=bool)
    gripper: float | None = None
    for frame, action in enumerate(actions):
        dropped[frame] = still[frame] and (gripper is None or action[-1] == gripper)
        if not dropped[frame]:
            gripper = float(action[-1])
    return dropped


_PASSED = 1.5
"""How far beyond -1 and +1 a measured gripper still counts as at its end. Chosen, not measured."""


def to_libero_gripper(actions: NDArray[np.float32], opened: float, closed: float) -> NDArray[np.float32]:
    """Actions (T, A) with a gripper, the last number, that is `opened` and `closed` at its ends → -1 and +1 there.

    What passes an end by up to a quarter of the way is at the end; what passes it further is left for
    `normalisation.check_gripper` to refuse.

    >>> to_libero_gripper(np.array([[0.5, 100.0], [0.5, 25.0]], np.float32), 100, 0)[:, 1].tolist()
    [-1.0, 0.5]
    """
    gripper = 2 * (actions[:, -1:].astype(np.float64) - opened) / (closed - opened) - 1
    gripper = np.where(np.abs(gripper) <= _PASSED, gripper.clip(-1, 1), gripper)
    return np.concatenate((actions[:, :-1], gripper.astype(np.float32)), axis=1)


def episode_rows(episode: Episode, options: RowOptions) -> Iterator[dict[str, Any]]:
    """The rows of one episode, checked and with the options applied.

    Raises:
        DemonstrationError: see `check_episode_values`; or nothing is left of it without no-ops.
    """
    check_episode_values(episode, options)
    columns = dict(episode.columns)
    if options.gripper is not None:
        columns["action"] = to_libero_gripper(np.asarray(columns["action"], dtype=np.float32), *options.gripper)
    kept = np.arange(len(episode))
    if options.drop_noops:
        kept = np.flatnonzero(~noops(np.asarray(columns["action"], dtype=np.float32)))
        if not len(kept):
            raise DemonstrationError(f"{episode.source} holds nothing but no-ops: leave it out, or keep no-ops")
    for number, frame in enumerate(kept):
        row = dict(episode.values)
        row |= {name: _plain(column[frame]) for name, column in columns.items()}
        for name, pictures in episode.images.items():
            try:
                row[name] = _encoded(pictures[frame], rotate=options.rotate)
            except Exception as error:  # Pillow's formats raise whatever they meet in a damaged picture
                raise DemonstrationError(
                    f"{episode.source}: {name} of frame {frame} is no picture that can be read ({error!s:.200}): get "
                    "the file again, or leave the episode out"
                ) from error
        yield {**row, "frame_index": number, "done": number == len(kept) - 1}


def check_table(frames: Any) -> None:
    """Refuse a stream, whose rows cannot be addressed.

    Raises:
        ValueError: `frames` is one.
    """
    if not hasattr(frames, "__len__"):
        raise ValueError(
            "a stream has no rows that can be chosen from: call load_demonstrations without streaming=True, or make a "
            "table of the stream by datasets.Dataset.from_generator"
        )


def png(picture: NDArray[np.uint8], *, compress_level: int = 4) -> bytes:
    """A uint8 RGB picture (H, W, 3) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()


def decode(picture: Any) -> NDArray[np.uint8]:
    """A picture of an `Episode`, or a PIL image, as a uint8 RGB array (H, W, 3)."""
    if isinstance(picture, Mapping):
        picture = Image.open(io.BytesIO(picture["bytes"]))
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(f"{picture.width} × {picture.height} pixels are more than {MOST_PIXELS:,}")
    if isinstance(picture, Image.Image):
        picture = picture.convert("RGB")
    return np.asarray(picture, dtype=np.uint8)


def _encoded(picture: Any, *, rotate: bool) -> dict[str, Any]:
    array = decode(picture)
    if isinstance(picture, Mapping) and not rotate:
        return {"bytes": picture["bytes"], "path": None}  # by its path, `datasets` would open another file
    return {"bytes": png(np.ascontiguousarray(array[::-1, ::-1]) if rotate else array), "path": None}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
