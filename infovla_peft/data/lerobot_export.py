"""Writing demonstrations as a LeRobot data set v3, so that other people's tools can read and train on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ..files import atomic_folder, write_json
from .lerobot import COLUMNS, EPISODES, INFO, STATS, TASKS
from .lerobot_statistics import ChannelHistogram, Moments
from .rows import DemonstrationError, decode

VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FILES_PER_CHUNK, DATA_MEGABYTES, VIDEO_MEGABYTES = 1000, 100, 200
"""LeRobot's own limits."""
FRAMES_PER_SECOND = 20
"""LIBERO's rate of control."""
NAMES = {
    "state": ["x", "y", "z", "rx", "ry", "rz", "finger_1", "finger_2"],
    "action": ["dx", "dy", "dz", "drx", "dry", "drz", "gripper"],
}
"""Of LIBERO's eight and seven numbers; other dimensions are numbered."""


def export_lerobot(
    frames: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    frames_per_second: int = FRAMES_PER_SECOND,
    robot_type: str = "panda",
    codec: str = "libx264",
    quality: int = 18,
) -> Path:
    """Write frames as a LeRobot data set v3.0: Parquet, MP4 and metadata, in the names of `HuggingFaceVLA/libero`.

    Pictures are compressed with loss; numbers are kept as they are. Actions stay in LIBERO's convention. An image
    column of another name is written as `observation.images.<name>`.

    Args:
        frames: what `load_demonstrations` gives, streamed or not: episode after episode.
        folder: a new one; or a LeRobot data set, which is replaced as a whole once all is written.
        frames_per_second: of the recording, ≥ 1; LIBERO acts at 20 Hz.
        robot_type: written to `meta/info.json`.
        codec: encoder of the videos; `libsvtav1` is LeRobot's own, smaller and slower.
        quality: constant rate factor of the encoder: 0 = without loss, higher is smaller.

    Returns:
        The folder.

    Raises:
        ImportError: PyAV is not installed.
        FileExistsError: the folder holds something else, which stays.
        DemonstrationError: no frames, no pictures, pictures of an odd size, or frames that are not in order.
        ValueError: `frames_per_second` is no positive integer, or FFmpeg has no such encoder.

    Example:
        >>> frames = load_demonstrations("runs/quickstart/demonstrations")  # doctest: +SKIP
        >>> export_lerobot(frames, "libero_scripted")  # doctest: +SKIP
    """
    folder = Path(folder)
    check_target(folder)
    if type(frames_per_second) is not int or frames_per_second < 1:
        raise ValueError(f"frames_per_second must be a positive integer, got {frames_per_second!r}")
    with atomic_folder(folder) as temporary:
        writer = _Writer(temporary, frames_per_second, codec, quality)
        try:
            for episode in _episodes(frames):
                writer.add(episode)
        finally:
            writer.close()
        writer.finish(robot_type)
    return folder


def check_target(folder: Path) -> None:
    """See that an export can be made, before anything is recorded for it.

    Raises:
        ImportError: PyAV is not installed.
        FileExistsError: the folder holds something else than a LeRobot data set.
    """
    if importlib.util.find_spec("av") is None:
        raise ImportError("writing videos needs PyAV: pip install 'infovla-peft[data]'")
    if folder.exists() and not (folder / INFO).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds no LeRobot data set, so it is not replaced by one; name another folder")


def _episodes(frames: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Rows of one episode after another."""
    rows: list[Mapping[str, Any]] = []
    for row in frames:
        same = rows and (row["task"], row["episode_index"]) == (rows[0]["task"], rows[0]["episode_index"])
        if rows and not same:
            yield rows
            rows = []
        if row["frame_index"] != len(rows):
            raise DemonstrationError(
                f"frame {row['frame_index']} of episode {row['episode_index']} of {row['task']!r} follows frame "
                f"{len(rows) - 1}: sort the frames by task, episode_index and frame_index"
            )
        rows.append(row)
    if rows:
        yield rows


def _cameras(row: Mapping[str, Any]) -> dict[str, str]:
    """LeRobot's name of every image column -> ours."""
    found: dict[str, str] = {}
    for name, value in row.items():
        encoded = isinstance(value, Mapping) and "bytes" in value
        if name in ("image", "wrist_image") or encoded or isinstance(value, Image.Image):
            other = found.setdefault(str(COLUMNS.get(name, f"observation.images.{name}")), name)
            if other != name:
                raise DemonstrationError(f"{name} and {other} have the same name in a LeRobot set: rename one of them")
    return found


@dataclass
class _Video:
    """The MP4 of one camera that is being written.

    Attributes:
        number: of the file, counted over chunks.
        frames: in it so far.
    """

    number: int = -1
    frames: int = 0
    container: Any = None
    stream: Any = None
    path: Path | None = None
    histogram: ChannelHistogram = field(default_factory=ChannelHistogram)


class _Writer:
    """What is written of the episodes so far."""

    def __init__(self, folder: Path, frames_per_second: int, codec: str, quality: int) -> None:
        self._folder, self._rate, self._codec, self._quality = folder, frames_per_second, codec, quality
        self._tasks: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._episodes: list[dict[str, Any]] = []
        self._videos: dict[str, _Video] = {}
        self._moments: dict[str, Moments] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._frames = 0
        self._data: list[pa.Table] = []
        self._data_number = self._data_bytes = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one episode."""
        length, number = len(rows), len(self._episodes)
        text, name = str(rows[0]["instruction"]), str(rows[0]["task"])
        if self._names.setdefault(text, name) != name:
            raise DemonstrationError(
                f"{self._names[text]!r} and {name!r} have the same instruction, {text!r}, and LeRobot tells tasks by "
                "it: export them as two data sets"
            )
        task = self._tasks.setdefault(text, len(self._tasks))
        columns: dict[str, NDArray[Any]] = {
            **{str(COLUMNS[name]): np.stack([np.asarray(row[name], np.float32) for row in rows]) for name in NAMES},
            "timestamp": (np.arange(length) / self._rate).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": np.arange(self._frames, self._frames + length),
            "task_index": np.full(length, task),
        }
        statistics: dict[str, dict[str, Any]] = {}
        place: dict[str, Any] = {}
        for key, name in _cameras(rows[0]).items():
            histogram = ChannelHistogram()
            place |= self._add_video(key, [decode(row[name]) for row in rows], histogram)
            statistics[key] = histogram.describe()
        if not place:
            raise DemonstrationError("the frames have no pictures: a policy needs some")
        for key, values in columns.items():
            own = Moments()
            for moments in (own, self._moments.setdefault(key, Moments())):
                moments.add(values.reshape(length, -1))
            statistics[key] = own.describe()
            self._same_shape(key, values.shape[1:] or (1,))
        data_file = self._add_data(columns)
        self._episodes.append(
            {
                "episode_index": number,
                "tasks": [text],
                "length": length,
                "data/chunk_index": data_file // FILES_PER_CHUNK,
                "data/file_index": data_file % FILES_PER_CHUNK,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + length,
                **place,
                **{f"stats/{key}/{name}": value for key, of in statistics.items() for name, value in of.items()},
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._frames += length

    def close(self) -> None:
        """Finish the videos."""
        for video in self._videos.values():
            _close(video)

    def finish(self, robot_type: str) -> None:
        """Write what describes the whole."""
        import pandas

        if not self._episodes:
            raise DemonstrationError("there are no frames to export")
        self._write_data()
        features = {
            **{key: self._camera_feature(key) for key in self._videos},
            **{key: self._feature(key) for key in self._moments},
        }
        path = self._folder / EPISODES.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), path)
        index = pandas.Index(list(self._tasks), name="task")
        pandas.DataFrame({"task_index": list(self._tasks.values())}, index=index).to_parquet(self._folder / TASKS)
        statistics = {key: video.histogram.describe() for key, video in self._videos.items()}
        write_json(self._folder / STATS, statistics | {key: each.describe() for key, each in self._moments.items()})
        info = {
            "codebase_version": VERSION,
            "robot_type": robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_MEGABYTES,
            "video_files_size_in_mb": VIDEO_MEGABYTES,
            "fps": self._rate,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        }
        write_json(self._folder / INFO, info)

    def _same_shape(self, key: str, shape: tuple[int, ...]) -> None:
        if self._shapes.setdefault(key, shape) != shape:
            raise DemonstrationError(f"{key} has the shape {shape} after {self._shapes[key]}: export them separately")

    def _add_data(self, columns: Mapping[str, NDArray[Any]]) -> int:
        """Keep an episode's rows for the current Parquet file; its number."""
        arrays = {
            # LeRobot reads a feature of shape (1,) as a scalar.
            key: pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
            if values.ndim == 2 and values.shape[1] > 1
            else values.ravel()
            for key, values in columns.items()
        }
        table = pa.table(arrays)
        if self._data and self._data_bytes + table.nbytes > DATA_MEGABYTES * 2**20:
            self._write_data()
            self._data_number += 1
        self._data.append(table)
        self._data_bytes += table.nbytes
        return self._data_number

    def _write_data(self) -> None:
        import datasets

        table = pa.concat_tables(self._data)
        path = self._folder / _numbered(DATA_PATH, self._data_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset(table).to_parquet(path)  # with the column types that `datasets` looks for
        self._data, self._data_bytes = [], 0

    def _add_video(self, key: str, pictures: list[NDArray[np.uint8]], histogram: ChannelHistogram) -> dict[str, Any]:
        """Append an episode's pictures to the current video of a camera; where they are, for meta/episodes."""
        import av

        height, width = pictures[0].shape[:2]
        if height % 2 or width % 2:
            raise DemonstrationError(f"{key} is {width} x {height} pixels; videos need even sizes, record with others")
        for picture in pictures:
            self._same_shape(key, picture.shape)
        video = self._videos.setdefault(key, _Video())
        # An encoder that looks ahead has written nothing yet, not even the file.
        written = video.path.stat().st_size if video.path is not None and video.path.is_file() else 0
        if video.path is None or written > VIDEO_MEGABYTES * 2**20:
            self._open(key, video, height, width)
        start = video.frames / self._rate
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = video.frames, Fraction(1, self._rate)
            video.container.mux(video.stream.encode(frame))
            video.frames += 1
        histogram.add(np.stack(pictures))
        video.histogram.merge(histogram)
        place = f"videos/{key}"
        return {
            f"{place}/chunk_index": video.number // FILES_PER_CHUNK,
            f"{place}/file_index": video.number % FILES_PER_CHUNK,
            f"{place}/from_timestamp": start,
            f"{place}/to_timestamp": video.frames / self._rate,
        }

    def _open(self, key: str, video: _Video, height: int, width: int) -> None:
        import av

        _close(video)
        video.number, video.frames = video.number + 1, 0
        video.path = self._folder / _numbered(VIDEO_PATH, video.number, video_key=key)
        video.path.parent.mkdir(parents=True, exist_ok=True)
        video.container = av.open(str(video.path), "w")
        try:
            video.stream = video.container.add_stream(self._codec, rate=self._rate)
        except ValueError as error:
            raise ValueError(f"FFmpeg has no encoder {self._codec!r} here: choose another `codec`") from error
        video.stream.width, video.stream.height, video.stream.pix_fmt = width, height, "yuv420p"
        # A key frame every other frame, as LeRobot has it: training reads single frames at random.
        video.stream.codec_context.gop_size = 2
        video.stream.options = {"crf": str(self._quality)}

    def _feature(self, key: str) -> dict[str, Any]:
        shape = self._shapes[key]
        ours = next((name for name in NAMES if COLUMNS[name] == key), None)
        names = NAMES[ours] if ours and len(NAMES[ours]) == shape[0] else None
        if ours and names is None:
            names = [f"{ours}_{position}" for position in range(shape[0])]
        kind = "float32" if ours or key == "timestamp" else "int64"
        return {"dtype": kind, "shape": list(shape), "names": names}

    def _camera_feature(self, key: str) -> dict[str, Any]:
        import av

        path = self._videos[key].path
        height, width, _ = self._shapes[key]
        with av.open(str(path)) as container:
            codec = container.streams.video[0].codec_context.codec.canonical_name
        return {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": codec,
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": self._rate,
                "video.channels": 3,
                "has_audio": False,
            },
        }


def _close(video: _Video) -> None:
    if video.stream is not None:
        video.container.mux(video.stream.encode())
    if video.container is not None:
        video.container.close()
    video.container = video.stream = None


def _numbered(pattern: str, number: int, **names: str) -> str:
    return pattern.format(chunk_index=number // FILES_PER_CHUNK, file_index=number % FILES_PER_CHUNK, **names)
