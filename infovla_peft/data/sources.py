"""Where demonstrations come from: files here or on the Hub, and what every reader of a format offers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..files import seen_from
from ..reading import is_inside
from ..task_names import SCENE, instruction_of
from .rows import MADE_COLUMNS, DemonstrationError, Episode

Columns = Mapping[str, str | Sequence[str] | None]
"""Our column -> the name it has there, several to be joined, or None to leave it out."""


@dataclass(frozen=True)
class EpisodeEntry:
    """One demonstration that can be read.

    Attributes:
        task, instruction, suite: what is shown; `task` as LIBERO names it, or the instruction with underscores.
        index: its number within the task.
        file: where it lies, relative to the location.
        place: which part of the file; the reader's own.
        stamp: changes when the file does.
    """

    task: str
    instruction: str
    suite: str
    index: int
    file: str
    place: Any = None
    stamp: str = ""


class Source(Protocol):
    """A set of demonstrations in one format. Picklable, so that workers of a `DataLoader` can read it.

    Attributes:
        images: the image columns that every episode has.
        upside_down: whether its pictures must be rotated by 180 degrees to be upright.
    """

    @property
    def images(self) -> Sequence[str]: ...

    @property
    def upside_down(self) -> bool: ...

    def entries(self) -> list[EpisodeEntry]:
        """What there is, task after task."""
        ...

    def read(self, entry: EpisodeEntry) -> Episode:
        """One of `entries`.

        Raises:
            DemonstrationError: the file is damaged, or lacks a column.
        """
        ...


@dataclass(frozen=True)
class Location:
    """A folder (or one file) here, or a data set repository of the Hub, whose files are fetched when asked for.

    Attributes:
        folder: None for a repository.
        repo_id, revision, token, cache_dir: as in `huggingface_hub.hf_hub_download`. The token is neither shown nor
            pickled, which keeps it out of caches too: a process that is spawned has that of `hf auth login`.
    """

    folder: Path | None
    repo_id: str = ""
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False, compare=False)
    cache_dir: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "token": None}

    def __deepcopy__(self, _memo: dict[int, Any]) -> Location:
        return self  # not by way of the pickled state, which has no token

    @classmethod
    def find(cls, source: str | Path, **hub: Any) -> Location:
        """A path that exists, else a Hub id `user/name`.

        Raises:
            FileNotFoundError: neither.
            ValueError: a revision of what lies here.
        """
        if Path(source).exists():
            if hub.get("revision") is not None:
                raise ValueError(f"{source} is here, where there are no revisions; leave `revision` out")
            return cls(Path(source))
        name = str(source).removeprefix("hf://datasets/").removeprefix("datasets/")
        if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            raise FileNotFoundError(
                f"there are no demonstrations at {source}{seen_from(Path(source))}: give a folder (recorded by "
                "`infovla demos`, LIBERO's HDF5 files, or a LeRobot data set) or a Hub id user/name"
            )
        return cls(None, name, **hub)

    def __str__(self) -> str:
        return str(self.folder) if self.folder is not None else self.repo_id

    def file(self, name: str) -> Path:
        """The path of a file, fetched now if it is on the Hub and not yet in the cache.

        Raises:
            FileNotFoundError: there is none, or the Hub did not give it.
            DemonstrationError: the name leads out of the location.
        """
        self._check_name(name)
        if self.folder is not None:
            path = self.folder if self.folder.is_file() else self.folder / name
            if not _is_file(path):
                raise FileNotFoundError(f"{path} is missing")
            return path
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(
                hf_hub_download(
                    self.repo_id,
                    name,
                    repo_type="dataset",
                    revision=self.snapshot.name,
                    token=self.token,
                    cache_dir=self.cache_dir,
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(
                f"{self.repo_id} is no folder here, and the Hub did not give {name} "
                f"({str(error).splitlines()[0]}); check the name, the network, and `hf auth login`"
            ) from error

    def _check_name(self, name: str) -> None:
        if not (self.folder is not None and self.folder.is_file()) and not is_inside(name):
            raise DemonstrationError(
                f"{self} names a file outside itself, {name!r:.200}; it is not read: correct the name in the set's "
                "manifest.json or meta/info.json, or get the set again from a source that you trust"
            )

    def has(self, name: str) -> bool:
        """Whether there is such a file; of a repository: whether the Hub gives it."""
        if self.folder is not None:
            return (self.folder / name).is_file()
        return name in self.names

    def glob(self, *patterns: str) -> list[str]:
        """Names of the files, relative to the location, that match a pattern at any depth; sorted."""
        if self.folder is not None and self.folder.is_file():
            return [self.folder.name]
        names = self.names
        return sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All files."""
        if self.folder is not None:
            return _files_below(self.folder)
        from huggingface_hub import dataset_info, list_repo_files

        try:
            # Fails at once without a network, where listing would try again for half a minute.
            dataset_info(self.repo_id, revision=self.snapshot.name, token=self.token)
            return tuple(
                list_repo_files(self.repo_id, repo_type="dataset", revision=self.snapshot.name, token=self.token)
            )
        except Exception as error:
            if not _from_hub(error):
                raise
            if found := _files_below(self.snapshot):  # without a network: what was fetched before
                return found
            raise self._not_listed(error) from error

    @cached_property
    def snapshot(self) -> Path:
        """Of a repository: its folder in the Hub's cache, named by the commit. Asked once: all files are of it.

        Raises:
            FileNotFoundError: the Hub does not say, and the cache does not know it either.
        """
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    self.repo_id,
                    repo_type="dataset",
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    allow_patterns=["meta/info.json", "manifest.json"],
                )
            )
        except Exception as error:
            if not _from_hub(error):
                raise
            raise self._not_listed(error) from error

    def _not_listed(self, error: Exception) -> FileNotFoundError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return FileNotFoundError(
            f"{self.repo_id} is no folder here, and the Hub did not list it ({reason}); check the name, the network, "
            "and `hf auth login` for a private one"
        )

    def stamp(self, name: str) -> str:
        """Changes when the file does; of a repository, nothing is fetched for it and its commit stands for all.

        Raises:
            DemonstrationError: the name leads out of the location.
        """
        self._check_name(name)
        if self.folder is None:
            return self.snapshot.name
        path = self.folder if self.folder.is_file() else self.folder / name
        if not _is_file(path):
            return ""
        status = path.stat()
        return f"{status.st_size}-{status.st_mtime_ns}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is longer than names can be
        return False


def _from_hub(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from ..remote import broken_connection

    return isinstance(error, (HfHubHTTPError, HFValidationError, OSError)) or broken_connection(error)


def _files_below(root: Path) -> tuple[str, ...]:
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return tuple(sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)))


def select_entries(
    entries: Sequence[EpisodeEntry], tasks: Sequence[str] | None, episodes: int | None, where: str
) -> list[EpisodeEntry]:
    """The demonstrations of some tasks, in the order of `tasks`, the first `episodes` of each.

    A task is named as in the set, or by its instruction. What was asked for by a name of LIBERO keeps that name,
    unless the set has it from another scene: the same words are another task there.

    Raises:
        DemonstrationError: a task is not there, or only in another scene, or several have the instruction; it has too
            few demonstrations; or there are none at all.
    """
    names = list(dict.fromkeys(entry.task for entry in entries))
    chosen: list[EpisodeEntry] = []
    for wanted in names if tasks is None else tasks:
        mine = [entry for entry in entries if entry.task == wanted]
        if not mine:
            mine = _by_instruction(entries, wanted, where)
        if not mine:
            raise DemonstrationError(f"{where} holds no demonstrations of {wanted!r}, only of {names}")
        if episodes is not None and len(mine) < episodes:
            raise DemonstrationError(
                f"{where} holds {len(mine)} demonstrations of {wanted!r}, not {episodes}: ask for fewer, or add some"
            )
        chosen += mine[:episodes]
    if not chosen:
        raise DemonstrationError(f"{where} holds no demonstration")
    return chosen


def _by_instruction(entries: Sequence[EpisodeEntry], wanted: str, where: str) -> list[EpisodeEntry]:
    text = instruction_of(wanted).strip().lower()
    mine = [entry for entry in entries if entry.instruction.strip().lower() == text]
    candidates = list({entry.task.lower(): entry.task for entry in mine}.values())
    if " " not in wanted:
        # The right scene would be the very name; a set of LIBERO's own names has no scene where a suite has but one.
        named = {entry.task for entry in mine if entry.suite and instruction_of(entry.task).lower() == text}
        if others := [
            task for task in candidates if re.match(SCENE, task) or (re.match(SCENE, wanted) and task in named)
        ]:
            raise DemonstrationError(
                f"{where} holds no demonstrations of {wanted!r}; the same instruction is that of {others} there, in "
                "another scene: ask for one of these names, or add demonstrations of the right scene"
            )
        mine = [replace(entry, task=wanted) for entry in mine]
    if len(candidates) > 1:
        raise DemonstrationError(f"{where} holds several tasks that are {wanted!r}: ask for one of {candidates}")
    return mine


def resolve_columns(columns: Columns | None, defaults: Columns) -> dict[str, tuple[str, ...]]:
    """Our columns -> names there, with the user's mapping over the format's own.

    Raises:
        ValueError: action or state is left out, an image has another number of names than one, or is named as a
            column that is made here.
    """
    if taken := sorted(set(columns or {}) & MADE_COLUMNS):
        raise ValueError(f"`columns` names an image {taken[0]!r}, as a column is called already: give it another name")
    joined = {**defaults, **(columns or {})}
    result = {
        name: (there,) if isinstance(there, str) else tuple(there)
        for name, there in joined.items()
        if there is not None
    }
    if missing := [name for name in ("state", "action") if not result.get(name)]:
        raise ValueError(f"`columns` leaves out {' and '.join(missing)}, which a policy needs")
    for name, there in result.items():
        if name not in ("state", "action") and len(there) != 1:
            raise ValueError(
                f"`columns` has {len(there)} names for the image {name!r} ({', '.join(there) or 'none'}); only state "
                "and action are joined. Give it one, a further image a column of its own, and None to leave it out"
            )
    return result
