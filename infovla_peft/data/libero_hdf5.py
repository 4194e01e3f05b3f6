"""LIBERO's own files: one `<task>_demo.hdf5` per task, a group `data/demo_<i>` per demonstration.

Read are LIBERO's data sets as they are downloaded, and those that OpenVLA's `regenerate_libero_dataset.py` writes.
Pictures lie in them as the simulator gives them, upside down. The instruction follows from the file's name, as in
LIBERO; a file of another name may say it in its attribute `problem_info`.

LIBERO's `create_dataset.py` plays an action and then stores what is seen, so that in its files frame t of `obs` comes
after action t, though frame t of `states` comes before it. Regenerated files store both before the action. Where a
file stores the former, frames are given back as a policy meets them: observation t - 1 with action t, and the first
action, before which nothing was seen, is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..reading import parse_json
from ..task_names import instruction_of
from .rows import DemonstrationError, Episode, RowOptions, check_dimension
from .sources import Columns, EpisodeEntry, Location, resolve_columns

PATTERNS = ("*.hdf5", "*.h5")
COLUMNS: Columns = {
    "image": "obs/agentview_rgb",
    "wrist_image": "obs/eye_in_hand_rgb",
    "state": ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states"),
    "action": "actions",
}
AGAIN = "get the file again"
ARM = slice(1, 8)
"""Where a flattened state of the simulator (time, positions, velocities) has the seven joints of the Panda arm, which
is the first thing with joints in LIBERO's scenes."""

MOST_FRAMES = 10**6
MOST_BYTES = 4 << 30
"""Of one column of one demonstration; nobody steers an arm for half a day without a break."""
_MOST_LINKS = 16

Observations = Literal["auto", "before", "after"]


class LiberoHDF5Source:
    """Demonstrations in LIBERO's HDF5 files.

    Args:
        location: a folder with such files at any depth, one file, or a data set repository.
        columns: over `COLUMNS`. Names are those within `data/demo_<i>`.
        observations: whether frame t of `obs` was seen `before` or `after` action t. `auto`: what the arm's joints in
            the demonstration say, where `obs/joint_states` is nearer to the `states` of the same frame or of the next
            one; `before` if they are not there, or the arm stands still.
        tasks: names or instructions; where files are named for all of them, the other files are not opened.

    Raises:
        ImportError: h5py is not installed.
        DemonstrationError: a file is damaged, lacks a column, or has it in another file; two files hold the same task.
    """

    upside_down = True

    def __init__(
        self,
        location: Location,
        columns: Columns | None = None,
        tasks: Sequence[str] | None = None,
        observations: Observations = "auto",
    ) -> None:
        self.location = location
        self._observations = observations
        self._columns = resolve_columns(columns, COLUMNS)
        self._optional = {"wrist_image"} - set(columns or {})
        names = _files_of(location.glob(*PATTERNS), tasks)
        self._entries = [entry for name in names for entry in self._demonstrations(name)]
        files: dict[str, str] = {}
        for entry in self._entries:
            if (other := files.setdefault(entry.task, entry.file)) != entry.file:
                raise DemonstrationError(
                    f"{location} holds {entry.task!r} twice, in {other} and in {entry.file}, which would be mixed: "
                    "give the folder of one of them, or rename a file"
                )
        self._images = self._find_images()

    @property
    def images(self) -> list[str]:
        return self._images

    def entries(self) -> list[EpisodeEntry]:
        return self._entries

    def read(self, entry: EpisodeEntry) -> Episode:
        path = self.location.file(entry.file)
        source = f"{path}, {entry.place}"
        with _open(path) as file:
            group = _group(file, f"data/{entry.place}", path)
            images: dict[str, Any] = {name: _pictures(group, self._columns[name][0], source) for name in self.images}
            numbers = {name: _numbers(group, self._columns[name], name, source) for name in ("state", "action")}
            later = self._observations == "after" or (self._observations == "auto" and _seen_after(group, source))
        if later and len({len(column) for column in (*images.values(), *numbers.values())}) == 1:
            images = {name: column[:-1] for name, column in images.items()}
            numbers = {"state": numbers["state"][:-1], "action": numbers["action"][1:]}
        values = {"instruction": entry.instruction, "task": entry.task, "suite": entry.suite}
        return Episode(source, images, numbers, {**values, "episode_index": entry.index})

    def check(self, entry: EpisodeEntry, options: RowOptions) -> None:
        """See that every column is there, with the right dimension, without reading it.

        Raises:
            DemonstrationError: the first thing that is wrong.
        """
        path = self.location.file(entry.file)
        with _open(path) as file:
            group = _group(file, f"data/{entry.place}", path)
            for name, wanted in (("action", options.action_dim), ("state", options.state_dim)):
                shapes = [_dataset(group, there, f"{path}, {entry.place}").shape for there in self._columns[name]]
                found = sum(shape[1] if len(shape) == 2 else 1 for shape in shapes)
                check_dimension(f"{path}, {entry.place}", name, found, wanted)
            for name in self.images:
                _dataset(group, self._columns[name][0], f"{path}, {entry.place}")

    def _demonstrations(self, name: str) -> list[EpisodeEntry]:
        path, stamp = self.location.file(name), self.location.stamp(name)
        with _open(path) as file:
            data = _group(file, "data", path)
            task = re.sub(r"_demo$", "", path.stem)
            instruction = instruction_of(task)
            if not path.stem.endswith("_demo"):
                instruction = _said(data.attrs) or instruction
            keys = [key for key in map(str, data) if re.fullmatch("demo_[0-9]+", key)]
            if longest := [key for key in keys if len(key) > len("demo_") + 9]:
                raise DemonstrationError(f"{path} numbers a demonstration {longest[0]:.40}: it is damaged ({AGAIN})")
            numbered = sorted((int(key[5:]), key) for key in keys)
            if not numbered:
                raise DemonstrationError(f"{path} holds no demonstration (data/demo_0, ...): leave the file out")
            suite = _suite(data.attrs, path)
        return [EpisodeEntry(task, instruction, suite, number, name, key, stamp) for number, key in numbered]

    def _find_images(self) -> list[str]:
        wanted = [name for name in self._columns if name not in ("state", "action")]
        if not self._entries:
            return wanted
        first = self._entries[0]
        path = self.location.file(first.file)
        with _open(path) as file:
            group = _group(file, f"data/{first.place}", path)
            return [
                name
                for name in wanted
                if name not in self._optional or _find(group, self._columns[name][0]) is not None
            ]


def _files_of(names: list[str], tasks: Sequence[str] | None) -> list[str]:
    if tasks is None:
        return names
    known = {name: re.sub(r"_demo$", "", Path(name).stem) for name in names}
    mine = {
        task: [name for name, there in known.items() if there == task or instruction_of(there) == task.lower()]
        for task in tasks
    }
    return sorted({name for found in mine.values() for name in found}) if all(mine.values()) else names


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading HDF5 files needs h5py: pip install 'infovla-peft[data]'") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DemonstrationError(f"{path} is truncated or no HDF5 file ({error}): {AGAIN}") from error
    try:
        with file:
            yield file
    except DemonstrationError:
        raise
    except MemoryError as error:
        raise DemonstrationError(
            f"{path} holds more than there is memory for ({error}): give it more, or {AGAIN}"
        ) from error
    # What h5py and NumPy raise of damaged objects: any of these, by which piece of them is damaged.
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DemonstrationError(f"{path} is damaged ({error!s:.300}): {AGAIN}") from error


def _find(group: Any, name: str) -> Any:
    """What lies under a name, None if nothing does.

    Links are followed here, step by step: HDF5 itself would open whatever file one of them names.

    Raises:
        ValueError: a link leads to another file, or there is no end of links.
    """
    import h5py

    found, followed = group, 0
    steps = name.encode().split(b"/")[::-1]
    while steps:
        if (step := steps.pop()) in (b"", b"."):
            continue
        if not isinstance(found, h5py.Group) or not found.id.links.exists(step):
            return None
        kind = found.id.links.get_info(step).type
        if kind == h5py.h5l.TYPE_HARD:
            found = found[step]
        elif kind == h5py.h5l.TYPE_SOFT and followed < _MOST_LINKS:
            followed += 1
            target = found.id.links.get_val(step)
            found = found.file if target.startswith(b"/") else found
            steps += target.split(b"/")[::-1]
        else:
            raise ValueError(f"{name} is a link to another file, or to nothing, which is not followed")
    return found


def _group(file: Any, name: str, path: Path) -> Any:
    import h5py

    found = _find(file, name)
    if not isinstance(found, h5py.Group):
        raise DemonstrationError(
            f"{path} has no group {name!r} that can be read, only {sorted(map(str, file))!s:.300}: it is damaged "
            f"({AGAIN}), or not of LIBERO's format (leave it out)"
        )
    return found


def _dataset(group: Any, name: str, source: str) -> Any:
    import h5py

    found = _find(group, name)
    if not isinstance(found, h5py.Dataset):
        there: list[str] = []
        group.visititems(lambda key, value: there.append(str(key)) if isinstance(value, h5py.Dataset) else None)
        listed = ", ".join(sorted(there)) or "nothing"
        raise DemonstrationError(f"{source} lacks {name}; it has {listed:.1000}. Name the right ones by `columns`")
    if found.is_virtual or found.external:
        raise DemonstrationError(
            f"{source}: {name} is stored in another file, which is not read; copy it into this one with h5repack, or "
            f"{AGAIN} from a source that you trust"
        )
    if found.dtype.kind not in "biuf" or found.shape is None:
        raise DemonstrationError(f"{source}: {name} holds {found.dtype}, not numbers: {AGAIN}")
    if (found.shape or (0,))[0] > MOST_FRAMES or math.prod(found.shape) * found.dtype.itemsize > MOST_BYTES:
        raise DemonstrationError(
            f"{source}: {name} has the shape {found.shape}, which is more than {MOST_FRAMES:,} frames or "
            f"{MOST_BYTES >> 30} GiB: it is damaged ({AGAIN}), or leave it out"
        )
    return found


def _numbers(group: Any, names: tuple[str, ...], column: str, source: str) -> NDArray[np.float32]:
    parts = [np.asarray(_dataset(group, name, source)[()], dtype=np.float32) for name in names]
    parts = [part[:, None] if part.ndim == 1 else part for part in parts]
    if len({len(part) for part in parts}) > 1 or any(part.ndim != 2 for part in parts):
        raise DemonstrationError(
            f"{source}: {column} is made of {', '.join(names)}, whose shapes {[part.shape for part in parts]} do not "
            "go together; name the right ones with `columns`"
        )
    return np.concatenate(parts, axis=1)


def _seen_after(group: Any, source: str) -> bool:
    names = ("obs/joint_states", "states")
    if any(_find(group, name) is None for name in names):
        return False
    joints, states = (np.asarray(_dataset(group, name, source)[()], dtype=np.float64) for name in names)
    arm = states[:, ARM] if states.ndim == 2 else states
    if joints.ndim != 2 or joints.shape != arm.shape or len(arm) < 2:
        return False
    same, following = np.abs(joints[:-1] - arm[:-1]).mean(), np.abs(joints[:-1] - arm[1:]).mean()
    return bool(following < same / 2)  # not equal: a replay drifts a little from what was recorded


def _pictures(group: Any, name: str, source: str) -> NDArray[np.uint8]:
    pictures = _dataset(group, name, source)
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise DemonstrationError(
            f"{source}: {name} holds {pictures.dtype} of shape {pictures.shape}, not uint8 pictures (frames, "
            "height, width, 3); name the right one with `columns`"
        )
    return np.asarray(pictures[()])


def _said(attributes: Any) -> str:
    """The instruction that a file's attributes hold; "" if none."""
    try:
        said = parse_json(attributes.get("problem_info", "{}")).get("language_instruction", "")
    except (ValueError, TypeError, AttributeError, RecursionError):
        return ""
    words = said[0] if isinstance(said, list) and said else said  # a list in some of LIBERO's versions
    return str(words).strip().strip('"')


def _suite(attributes: Any, path: Path) -> str:
    stored = str(attributes.get("bddl_file_name", "")).encode(errors="replace").decode()
    named = Path(stored).parent.name or path.parent.name
    return named.removesuffix("_no_noops") if named.startswith("libero") else ""
