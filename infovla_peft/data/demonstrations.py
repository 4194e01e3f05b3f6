"""Demonstrations of any format as one `datasets.Dataset`: LIBERO's HDF5 files, LeRobot v3, our own recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..simulation.headless import cache_folder
from .lerobot import INFO as LEROBOT_INFO
from .lerobot import LeRobotSource
from .libero_hdf5 import PATTERNS as HDF5_PATTERNS
from .libero_hdf5 import LiberoHDF5Source, Observations
from .mapped import map_recorded
from .recorded import (
    MANIFEST,
    DemonstrationManifest,
    RecordedSource,
    check_episode,
    read_start,
)
from .rows import ACTION_DIM, CAMERA_COLUMNS, STATE_DIM, DemonstrationError, RowOptions, episode_rows, frame_features
from .sources import Columns, EpisodeEntry, Location, Source, select_entries

if TYPE_CHECKING:
    import datasets

__all__ = [
    "ACTION_DIM",
    "CAMERA_COLUMNS",
    "STATE_DIM",
    "DemonstrationError",
    "DemonstrationManifest",
    "check_episode",
    "load_demonstrations",
    "read_start",
    "recipe_demonstrations",
]

Format = Literal["auto", "recorded", "libero_hdf5", "lerobot"]


def load_demonstrations(
    source: str | Path,
    tasks: str | Sequence[str] | None = None,
    episodes: int | None = None,
    *,
    streaming: bool = False,
    format: Format = "auto",
    columns: Columns | None = None,
    rotate: bool | None = None,
    drop_noops: bool = False,
    observations: Observations = "auto",
    gripper: Sequence[float] | None = None,
    action_dim: int = ACTION_DIM,
    state_dim: int = STATE_DIM,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Frames of demonstrations, task after task, episode after episode, whatever format they are in.

    Args:
        source: a folder recorded by `infovla demos`; LIBERO's HDF5 files (a folder, or one file); a LeRobot data set
            v3 (a folder); or the Hub id of a data set repository that holds one of them.
        tasks: names or instructions of tasks, in the order in which they are wanted, or that of one; all if None.
        episodes: how many of each task, the first ones, ≥ 1; all if None. A LeRobot episode of several tasks is cut
            where they change, and each part counts as one of its task.
        streaming: read episode by episode while iterating, and keep nothing; a LeRobot repository's files are
            fetched when an episode of theirs is wanted (those with an episode of several tasks at once). Else all is
            prepared once, and memory-mapped from a cache.
        format: of the source; `auto` finds it out.
        columns: our column -> its name there, over the format's own: `{"image": "observation.images.top"}`. A list of
            names joins them (`state` and `action` only), None leaves an image out, and further keys are further
            images. Our columns are `image`, `wrist_image`, `state`, `action`.
        rotate: turn the pictures by 180 degrees. None: as the format needs it to be upright, that is for LIBERO's
            HDF5 files, which lie upside down, and not for the others.
        drop_noops: leave out actions that do nothing, by OpenVLA's rule, see `rows.noops`. Not for what `infovla
            demos` recorded, where they are rare and deliberate, unless you want it.
        observations: of LIBERO's HDF5 files: whether frame t was seen `before` action t, as in regenerated files, or
            `after` it, as in LIBERO's own. `after` pairs observation t - 1 with action t and leaves out the first
            action. `auto` finds it out for every demonstration, from the arm's joints in `states` and
            `obs/joint_states`, and takes `before` where these are not there or do not tell.
        gripper: what the last number of an action is there when it opens and when it closes the gripper, for example
            `(1, 0)`, or `(100, 0)`: it becomes LIBERO's, -1 and +1. None: it is LIBERO's. Training refuses one that
            cannot be, see `normalisation.check_gripper`; one that has -1 for closed and +1 for open looks the same
            and needs `(1, -1)`.
        action_dim, state_dim: A and P, what the data must have.
        revision, token: of a repository (a folder has no revision), as in `huggingface_hub`.
        cache_dir: for what is prepared; default: `.cache` in a folder of our own recordings if it can be written,
            else `demonstrations` in the package's cache (`INFOVLA_CACHE`). Repositories are kept in the Hub's own
            cache.

    Returns:
        A `Dataset`, or an `IterableDataset` whose shards are the episodes. Columns as in `data/rows.py`; recorded
        ones have `executed_action` and `success` too.

    Raises:
        FileNotFoundError: no demonstrations there.
        DemonstrationError: a task or an episode is missing, or a file is not what it should be: a column is missing,
            another dimension, NaN, truncated. The message names the file and the cure.
        ValueError: `episodes` is below 1, `revision` of a folder, or `columns` or a `gripper` that cannot be.

    Example:
        >>> frames = load_demonstrations("LIBERO/datasets/libero_goal", ["turn on the stove"])  # doctest: +SKIP
        >>> for frame in load_demonstrations("HuggingFaceVLA/libero", streaming=True):  # doctest: +SKIP
        ...     break
    """
    if episodes is not None and episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}; leave it out for all of them")
    tasks = [tasks] if isinstance(tasks, str) else tasks
    location = Location.find(source, revision=revision, token=token)
    found = open_source(location, format, columns, tasks, observations)
    options = RowOptions(
        rotate=found.upside_down if rotate is None else rotate,
        drop_noops=drop_noops,
        action_dim=action_dim,
        state_dim=state_dim,
        gripper=None if gripper is None else tuple(gripper),  # type: ignore[arg-type]
    )
    entries = select_entries(found.entries(), tasks, episodes, str(location))
    for entry in {entry.task: entry for entry in reversed(entries)}.values():
        found.check(entry, options)
    if isinstance(found, RecordedSource):
        if not streaming and not (options.rotate or drop_noops):
            return map_recorded(found, entries, cache_dir)
        features = found.features
    else:
        features = frame_features(found.images, state_dim=state_dim, action_dim=action_dim)
    return _generate(found, entries, options, features, streaming=streaming, cache_dir=cache_dir)


def recipe_demonstrations(recipe: Mapping[str, Any], recorded: Path) -> tuple[str | Path, dict[str, Any]]:
    """Where the demonstrations of a recipe are, and the options of `load_demonstrations` to read them with.

    Args:
        recipe: with the fields of `StreamConfig`.
        recorded: where scripted ones are, unless the recipe names another folder.

    Raises:
        ValueError: an entry of `demonstrations_columns` is not of the form `ours=theirs`.
    """
    source = recipe.get("demonstrations_source")
    if source is None:
        return Path(recipe.get("demonstrations_folder") or recorded), {}
    columns: dict[str, list[str]] = {}
    for entry in recipe.get("demonstrations_columns") or ():
        ours, equals, theirs = entry.partition("=")
        if not (ours and equals and theirs):
            raise ValueError(f"demonstrations_columns: {entry!r} is not of the form image=observation.images.top")
        columns.setdefault(ours, []).append(theirs)  # named twice, they are joined
    options = {
        "columns": columns or None,
        "rotate": recipe.get("demonstrations_rotate"),
        "drop_noops": bool(recipe.get("drop_noops")),
        "observations": recipe.get("demonstrations_observations") or "auto",
        "gripper": recipe.get("demonstrations_gripper"),
    }
    return str(source), options


def open_source(
    location: Location,
    format: Format = "auto",
    columns: Columns | None = None,
    tasks: Sequence[str] | None = None,
    observations: Observations = "auto",
) -> RecordedSource | LiberoHDF5Source | LeRobotSource:
    """The reader of what lies at a location.

    Args:
        tasks: those that are wanted, so that files of others need not be opened.
        observations: of LIBERO's HDF5 files, see `load_demonstrations`.

    Raises:
        FileNotFoundError: nothing that can be read.
        ValueError: `columns` for our own recordings, whose columns are known; an unknown format; `observations`
            after the action in another format than LIBERO's HDF5 files.
    """
    if observations not in get_args(Observations):
        raise ValueError(f"unknown observations {observations!r}: choose auto, before or after")
    format = _detect(location) if format == "auto" else format
    if format == "libero_hdf5":
        return LiberoHDF5Source(location, columns, tasks, observations)
    if observations == "after":
        raise ValueError("observations after the action are of LIBERO's HDF5 files only: leave `observations` out")
    if format == "lerobot":
        return LeRobotSource(location, columns)
    if format != "recorded":
        raise ValueError(f"unknown format {format!r}: choose auto, recorded, libero_hdf5 or lerobot")
    if columns:
        raise ValueError("recorded demonstrations have the columns already: leave `columns` out")
    return RecordedSource(location)


def _detect(location: Location) -> Format:
    if location.folder is None or location.folder.is_dir():
        if location.has(MANIFEST):
            return "recorded"
        if location.has(LEROBOT_INFO):
            return "lerobot"
    if location.glob(*HDF5_PATTERNS):
        return "libero_hdf5"
    raise FileNotFoundError(
        f"{location} holds no demonstrations: neither {MANIFEST} (run `infovla demos`), nor {LEROBOT_INFO} (LeRobot), "
        "nor *.hdf5 (LIBERO)"
    )


def _rows(source: Source, entries: list[EpisodeEntry], options: RowOptions) -> Iterator[dict[str, Any]]:
    for entry in entries:
        yield from episode_rows(source.read(entry), options)


def _generate(
    source: Source,
    entries: list[EpisodeEntry],
    options: RowOptions,
    features: datasets.Features,
    *,
    streaming: bool,
    cache_dir: str | Path | None,
) -> datasets.Dataset | datasets.IterableDataset:
    import datasets

    arguments = {"source": source, "entries": entries, "options": options}
    if streaming:
        return datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
    try:
        frames = datasets.Dataset.from_generator(
            _rows,
            features=features,
            cache_dir=str(cache_dir or cache_folder() / "demonstrations"),
            gen_kwargs=arguments,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (DemonstrationError, ImportError)):
            raise error.__cause__ from None
        raise
    assert isinstance(frames, datasets.Dataset)
    return frames
