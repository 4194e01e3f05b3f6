"""Reading LeRobot data sets v3: numbers in Parquet files, pictures in MP4 videos or Parquet, many episodes a file.

meta/info.json                                     what there is: features, frames per second, where files lie
meta/tasks.parquet                                 the tasks' texts and numbers
meta/episodes/chunk-000/file-000.parquet           of each episode its tasks, its length and its place in the files
data/chunk-000/file-000.parquet                    one row per frame, with its task's number
videos/<camera>/chunk-000/file-000.mp4             one frame per row, episodes one after another

LeRobot has a task for every frame, and lists those of an episode in no order. An episode of several tasks is cut
where they change: each part is a demonstration of its own task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..reading import Checker, read_json
from .rows import DemonstrationError, Episode, RowOptions, check_dimension
from .sources import Columns, EpisodeEntry, Location, resolve_columns

INFO, TASKS, STATS = "meta/info.json", "meta/tasks.parquet", "meta/stats.json"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
COLUMNS: Columns = {
    "image": "observation.images.image",
    "wrist_image": "observation.images.image2",
    "state": "observation.state",
    "action": "action",
}
"""The names in `HuggingFaceVLA/libero`."""
OTHER_NAMES: dict[str, Sequence[str]] = {
    "image": ("image",),
    "wrist_image": ("observation.images.wrist_image", "wrist_image"),
    "state": ("state",),
    "action": ("actions",),
}
"""Those in other conversions of LIBERO, openpi's among them; tried where the first are absent."""
AGAIN = "get the file again"
MOST_ROWS = 10**7
MOST_BYTES = 16 << 30
"""Of one Parquet file, decompressed. LeRobot begins another file at some hundred megabytes."""


class LeRobotSource:
    """A LeRobot data set v3, in a folder or on the Hub; of the Hub, files are fetched when an episode needs them.

    Args:
        location: the data set.
        columns: over `COLUMNS`. State and action may be joined from several features.

    Raises:
        FileNotFoundError: no `meta/info.json`.
        DemonstrationError: another version of the format, damaged files, or a feature that is not there.
    """

    upside_down = False

    def __init__(self, location: Location, columns: Columns | None = None) -> None:
        self.location = location
        self._info = _read_info(location.file(INFO))
        features = self._info["features"]
        names = resolve_columns(columns, COLUMNS)
        for name, others in OTHER_NAMES.items():
            if name not in (columns or {}) and names[name][0] not in features:
                names[name] = next(((other,) for other in others if other in features), names[name])
        if "wrist_image" not in (columns or {}) and names["wrist_image"][0] not in features:
            del names["wrist_image"]
        if missing := [there for each in names.values() for there in each if there not in features]:
            listed = ", ".join(features)
            raise DemonstrationError(
                f"{location} lacks {', '.join(missing)}; it has {listed:.1000}. Name the right ones with `columns`"
            )
        self._columns = names
        for name in self.images:
            if features[names[name][0]]["dtype"] not in ("image", "video"):
                raise DemonstrationError(f"{location}: {names[name][0]}, named for {name}, holds no pictures")

    @property
    def images(self) -> list[str]:
        return [name for name in self._columns if name not in ("state", "action")]

    @property
    def frames_per_second(self) -> float:
        return float(self._info["fps"])

    def check(self, _entry: EpisodeEntry, options: RowOptions) -> None:
        """See that actions and states have the right dimensions, as `meta/info.json` says.

        Raises:
            DemonstrationError: they have not.
        """
        for name, wanted in (("action", options.action_dim), ("state", options.state_dim)):
            shapes = [self._info["features"][there]["shape"] for there in self._columns[name]]
            check_dimension(str(self.location), name, sum(math.prod(shape) for shape in shapes), wanted)

    def entries(self) -> list[EpisodeEntry]:
        found: dict[str, list[EpisodeEntry]] = {}
        for row in sorted(self._episode_rows(), key=lambda row: row["episode_index"]):
            file = self._file("data_path", row["data/chunk_index"], row["data/file_index"])
            place: dict[str, Any] = {
                "episode": row["episode_index"],
                "length": row["length"],
                "videos": {key: self._video_place(row, key) for key in self._video_keys},
            }
            files = [file, *(video for video, _ in place["videos"].values())]
            stamp = " ".join(self.location.stamp(name) for name in files)
            for text, first, frames in self._parts(row, file, stamp):
                if not text:
                    raise DemonstrationError(
                        f"{self.location}: episode {row['episode_index']} has no task, which is the instruction that "
                        "a policy reads; write it into meta/tasks.parquet and the episode's entry in meta/episodes"
                    )
                mine, part = found.setdefault(text, []), {**place, "first": first, "frames": frames}
                mine.append(EpisodeEntry(text.replace(" ", "_"), text, "", len(mine), file, part, stamp))
        return [entry for entries in found.values() for entry in entries]

    def read(self, entry: EpisodeEntry) -> Episode:
        path = self._path(entry.file)
        number, first, frames = (entry.place[name] for name in ("episode", "first", "frames"))
        source = f"{self.location}, episode {number}"
        wanted = [there for name in ("state", "action") for there in self._columns[name]]
        stored = [self._columns[name][0] for name in self.images if self._columns[name][0] not in self._video_keys]
        with _reading(path):
            table = _numbers_of(path, tuple(wanted), entry.stamp)
            table = _frames_of(path, table, number, entry.place["length"]).slice(first, frames)
            numbers = {
                name: np.concatenate([_matrix(table[there]) for there in self._columns[name]], axis=1)
                for name in ("state", "action")
            }
            pictures = _pictures_of(path, number, stored) if stored else {}
        images: dict[str, Sequence[Any]] = {}
        for name in self.images:
            key = self._columns[name][0]
            if key in pictures:
                images[name] = pictures[key][first : first + frames]
            else:
                file, start = entry.place["videos"][key]
                times = start + np.arange(first, first + frames) / self.frames_per_second
                images[name] = read_frames(self._path(file), times, self.frames_per_second)
        values = {"instruction": entry.instruction, "task": entry.task, "suite": entry.suite}
        return Episode(source, images, numbers, {**values, "episode_index": entry.index})

    def _parts(self, row: dict[str, Any], file: str, stamp: str) -> list[tuple[str, int, int]]:
        """The tasks of an episode, each with its first frame and how many it has.

        Where its entry names one task, as nearly always, the frames are not looked at.
        """
        if len(row["tasks"]) == 1:
            return [(row["tasks"][0].strip(), 0, row["length"])]
        path = self._path(file)
        with _reading(path):
            table = _numbers_of(path, ("task_index",), stamp)
            numbers = _frames_of(path, table, row["episode_index"], row["length"])["task_index"].to_pylist()
        if unknown := set(numbers) - set(self._texts):
            raise DemonstrationError(
                f"{path}: frames of episode {row['episode_index']} have the task_index {min(unknown, key=str)!r:.40}, "
                f"which {TASKS} has no text for; add it there, or {AGAIN}"
            )
        parts: list[tuple[str, int, int]] = []
        for text, same in groupby(self._texts[number] for number in numbers):
            parts.append((text, sum(part[2] for part in parts), len(list(same))))
        return parts

    @cached_property
    def _texts(self) -> dict[int, str]:
        """The tasks' texts, by their numbers."""
        path = self._path(TASKS)
        check = Checker(str(path), DemonstrationError, AGAIN)
        with _reading(path):
            names = pq.read_schema(path).names
            text = "task" if "task" in names else "__index_level_0__"  # pandas' index, with a name or without
            rows = _read_table(path, ["task_index", text]).to_pylist()
        return {
            check.count(row["task_index"], "task_index"): check.typed(row[text], str, text).strip() for row in rows
        }

    @property
    def _video_keys(self) -> list[str]:
        keys = [self._columns[name][0] for name in self.images]
        return [key for key in keys if self._info["features"][key]["dtype"] == "video"]

    def _video_place(self, row: dict[str, Any], key: str) -> tuple[str, float]:
        place = f"videos/{key}"
        file = self._file("video_path", row[f"{place}/chunk_index"], row[f"{place}/file_index"], video_key=key)
        return file, row[f"{place}/from_timestamp"]

    def _file(self, pattern: str, chunk: int, file: int, **names: str) -> str:
        return str(self._info[pattern].format(chunk_index=chunk, file_index=file, **names))

    def _path(self, file: str) -> Path:
        try:
            return self.location.file(file)
        except FileNotFoundError as error:
            raise DemonstrationError(f"{error}: the data set is not complete; {AGAIN}") from error

    def _episode_rows(self) -> list[dict[str, Any]]:
        """The entries of meta/episodes, checked; its files follow one another until all episodes are there."""
        wanted = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
        for key in self._video_keys:
            wanted += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        rows: list[dict[str, Any]] = []
        chunk = file = 0
        while len(rows) < self._info["total_episodes"]:
            path = self._path(EPISODES.format(chunk_index=chunk, file_index=file))
            with _reading(path):
                more = _read_table(path, wanted).to_pylist()
                for row in more:
                    _check_episode(row, Checker(str(path), DemonstrationError, AGAIN))
            rows += more
            file += 1
            if file == self._info.get("chunks_size", 1000):
                chunk, file = chunk + 1, 0
        return rows


def _check_episode(row: dict[str, Any], check: Checker[DemonstrationError]) -> None:
    check.texts(row["tasks"], "tasks")
    for name, value in row.items():
        if name.endswith("/from_timestamp"):
            check.number(value, name, low=0)
        elif name != "tasks":
            check.count(value, name)


def _read_info(path: Path) -> dict[str, Any]:
    cure = f"it is damaged: {AGAIN}"
    check = Checker(str(path), DemonstrationError, cure)
    info: dict[str, Any] = check.typed(read_json(path, error=DemonstrationError, cure=cure), dict, "the content")
    _check_version(path, check.typed(info.get("codebase_version"), str, "codebase_version"))
    check.number(info.get("fps"), "fps", 0.01, 10_000)
    check.count(info.get("total_episodes"), "total_episodes")
    check.count(info.get("chunks_size", 1000), "chunks_size", minimum=1)
    kinds = set()
    for name, feature in check.typed(info.get("features"), dict, "features").items():
        where = f"features[{name!r:.60}]"
        kinds.add(check.typed(check.typed(feature, dict, where).get("dtype"), str, f"{where}.dtype"))
        for place, size in check.items(feature.get("shape"), f"{where}.shape"):
            check.count(size, place, minimum=1)
    for name in ("data_path", *(["video_path"] if "video" in kinds else [])):
        _check_pattern(path, name, info.get(name))
    return info


def _check_version(path: Path, version: str) -> None:
    if version.startswith("v3."):
        return
    if re.match("v[12][.]", version):
        cure = "convert it with LeRobot (python -m lerobot.datasets.v30.convert_dataset_v21_to_v30)"
    elif re.match("v[0-9]", version):
        cure = "update infovla-peft, or save the set with a LeRobot of that format"
    else:
        cure = f"it is damaged: {AGAIN}"
    raise DemonstrationError(f"{path} is of LeRobot's format {version:.40}, read here is v3.0: {cure}")


_FIELD = re.compile(r"\{(chunk_index|file_index)(:0?[1-9]d)?\}|\{video_key\}")


def _check_pattern(path: Path, name: str, pattern: object) -> None:
    """`str.format` looks into objects and makes texts of any length: only the format's own fields pass."""
    if not isinstance(pattern, str) or len(pattern) > 500 or re.search("[{}]", _FIELD.sub("", pattern)):
        raise DemonstrationError(
            f"{path}: {name} is {pattern!r:.80}; it may hold {{chunk_index:03d}}, {{file_index:03d}}, {{video_key}} "
            f"and no other braces: {AGAIN}"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What PyArrow and NumPy raise of a damaged file is refused by its name."""
    try:
        yield
    except DemonstrationError:
        raise
    except (MemoryError, pa.ArrowMemoryError) as error:
        raise DemonstrationError(
            f"{path} holds more than there is memory for ({error}): give it more, or {AGAIN}"
        ) from error
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DemonstrationError(f"{path} is truncated or no Parquet file ({error!s:.300}): {AGAIN}") from error


def _read_table(path: Path, columns: Sequence[str], filters: Any = None) -> pa.Table:
    with _reading(path):
        with pq.ParquetFile(path) as file:
            names, content = file.schema_arrow.names, file.metadata
            size = sum(content.row_group(group).total_byte_size for group in range(content.num_row_groups))
        if missing := [name for name in columns if name not in names]:
            listed = ", ".join(names)
            raise DemonstrationError(f"{path} lacks the columns {', '.join(missing)}; it has {listed:.1000}: {AGAIN}")
        if not 0 <= content.num_rows <= MOST_ROWS or not 0 <= size <= MOST_BYTES:
            raise DemonstrationError(
                f"{path} says that it holds {content.num_rows:,} rows of {size:,} bytes; read are up to "
                f"{MOST_ROWS:,} of {MOST_BYTES >> 30} GiB: it is damaged ({AGAIN}), or cut the set into more files"
            )
        return pq.read_table(path, columns=list(columns), filters=filters)


@lru_cache(maxsize=1)  # episodes of one file are read one after another
def _numbers_of(path: Path, columns: tuple[str, ...], _stamp: str) -> pa.Table:
    return _read_table(path, ["episode_index", "frame_index", *dict.fromkeys(columns)])


def _frames_of(path: Path, table: pa.Table, episode: int, length: int) -> pa.Table:
    """The rows of one episode, in order.

    Raises:
        DemonstrationError: there are more or fewer than its entry says.
    """
    own = np.flatnonzero(table["episode_index"].to_numpy() == episode)
    if len(own) != length:
        raise DemonstrationError(f"{path} holds {len(own)} frames of episode {episode} instead of {length}: {AGAIN}")
    return table.take(own).sort_by("frame_index")


def _pictures_of(path: Path, episode: int, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Encoded pictures of one episode, in order, by their columns."""
    table = _read_table(path, ["frame_index", *columns], filters=[("episode_index", "=", episode)])
    table = table.sort_by("frame_index")
    return {name: table[name].to_pylist() for name in columns}


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    values = column.to_pylist()
    if len({len(value) if isinstance(value, list) else 0 for value in values}) > 1:
        raise ValueError("a feature has rows of different lengths")
    matrix = np.asarray(values, dtype=np.float32)
    return matrix[:, None] if matrix.ndim == 1 else matrix


_LONGEST_GROUP = 250
"""Frames from one key frame to the next, at most, by x264's and x265's default (`keyint`)."""


def read_frames(path: Path, times: NDArray[np.float64], frames_per_second: float) -> list[NDArray[np.uint8]]:
    """The frames of a video at some times.

    Args:
        times: seconds, rising.
        frames_per_second: a frame belongs to a time that is nearer than half a frame.

    Raises:
        ImportError: PyAV is not installed.
        DemonstrationError: the file is no video, or ends before the last of the times.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install 'infovla-peft[data]'") from error

    found: list[NDArray[np.uint8]] = []
    half = 0.5 / frames_per_second
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # Where frames are stored in another order than shown, a seek may land behind the place.
            for start in (times[0] - half, times[0] - half - _LONGEST_GROUP / frames_per_second, 0.0):
                found = []
                container.seek(max(0, int(start / stream.time_base)), stream=stream)
                for frame in container.decode(stream):
                    if frame.time is None or frame.time < times[len(found)] - half:
                        continue
                    if frame.time > times[len(found)] + half:
                        break
                    found.append(frame.to_ndarray(format="rgb24"))
                    if len(found) == len(times):
                        return found
    # Beside FFmpeg's errors, those of texts, times and pictures that its bindings cannot convert.
    except (av.error.FFmpegError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise DemonstrationError(f"{path} is truncated or no video ({error}): {AGAIN}") from error
    raise DemonstrationError(
        f"{path} has no frame at {times[len(found)]:.3f} s, only {len(found)} of the {len(times)} frames from "
        f"{times[0]:.3f} s on: {AGAIN}"
    )
