"""Recorded demonstrations, mapped in memory: one Arrow file per task, made when they are recorded, or first opened.

    <cache>/<task>.arrow     an Arrow stream with the rows of its episodes, one after another
    <cache>/<task>.json      the SHA-256 of that file and of every episode's Parquet file, and in which state of the
                             file (size, times) it was found; with a checksum of its own

Opening a set only compares these states. A file in another state is read and hashed again: an episode that changed is
an error, an Arrow file that is not what was written is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from ..files import atomic_file, clean_up, locked
from ..integrity import DamagedFileError, FileState, read_sealed, sha256, sha256_of_state, write_sealed
from ..simulation.headless import cache_folder
from .recorded import RECORD_AGAIN, EpisodeRecord, RecordedSource, check_recorded, read_table
from .rows import DemonstrationError
from .sources import EpisodeEntry, Location

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 1
CACHE = ".cache"
"""In the folder of a set, with its own lock."""


def map_recorded(
    source: RecordedSource, entries: Iterable[EpisodeEntry], cache_dir: str | Path | None = None
) -> datasets.Dataset:
    """Frames of recorded episodes, read from the disk when they are used.

    Args:
        entries: of the source, task after task.
        cache_dir: see `load_demonstrations`.

    Raises:
        DemonstrationError: an episode's file is missing, damaged, or not that of the manifest.
        OSError: the cache cannot be written.
    """
    import datasets

    cache = _cache(source.location, cache_dir)
    tables: list[Any] = []
    seen: list[Any] = []
    for task, group in groupby(entries, key=lambda entry: str(entry.place)):
        wanted = [(source.record(entry), source.file(entry)) for entry in group]
        pack = _Pack(cache, task, source.features.arrow_schema)
        content = pack.find(wanted)
        whole = datasets.table.MemoryMappedTable.from_file(str(pack.arrow))
        first = 0
        begins = {}
        for episode in content.episodes:
            begins[episode.index] = first
            first += episode.frames
        numbers = [record.index for record, _ in wanted]
        for start, count in _runs([begins[number] for number in numbers], [record.frames for record, _ in wanted]):
            tables.append(whole.slice(start, count))
        seen.append([content.sha256, numbers])
    return datasets.Dataset(
        datasets.table.concat_tables(tables),
        info=datasets.DatasetInfo(features=source.features),
        fingerprint=hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16],
    )


def prepare_recorded(folder: str | Path, tasks: Collection[str] | None = None) -> None:
    """Make the Arrow files of some tasks of a recorded set, or of all, so that it opens at once.

    Raises:
        DemonstrationError, OSError: see `map_recorded`.
    """
    source = RecordedSource(Location(Path(folder)))
    entries = [entry for entry in source.entries() if tasks is None or entry.task in tasks]
    # Who opens a task of which an episode is gone, says whether that one is needed.
    torn = {entry.task for entry in entries if not (Path(folder) / entry.file).is_file()}
    if whole := [entry for entry in entries if entry.task not in torn]:
        map_recorded(source, whole)


def verify_mapped(folder: Path) -> tuple[list[Path], list[Path]]:
    """The Arrow files that a recorded set keeps in its own folder: those that are whole, and those that are not.

    Opening a set finds by itself, and makes again, those whose size or times changed; what a disk lost in silence is
    found here alone.
    """
    whole: list[Path] = []
    damaged: list[Path] = []
    for file in sorted((folder / CACHE).glob("*.json")):
        arrow = file.with_suffix(".arrow")
        content = _read(file)
        if content is not None and arrow.is_file():
            (whole if sha256(arrow) == content.sha256 else damaged).append(arrow)
    return whole, damaged


@dataclass
class _Kept:
    """One episode in an Arrow file, and its Parquet file when it was last hashed."""

    index: int
    frames: int
    sha256: str
    state: FileState

    def is_of(self, record: EpisodeRecord) -> bool:
        return self.frames == record.frames and record.sha256 in ("", self.sha256)


@dataclass
class _Content:
    """What an Arrow file holds, and its state when it was last hashed."""

    sha256: str
    state: FileState
    columns: list[str]
    episodes: list[_Kept]


_Wanted = Sequence[tuple[EpisodeRecord, Path]]


class _Pack:
    """The Arrow file of one task.

    Args:
        cache: the folder.
        task: its name, which may come from elsewhere.
        schema: of the rows.
    """

    def __init__(self, cache: Path, task: str, schema: pa.Schema) -> None:
        name = f"{re.sub(r'[^a-zA-Z0-9_]', '_', task)[:100]}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"
        self.arrow, self._index = cache / f"{name}.arrow", cache / f"{name}.json"
        self._schema, self._columns = schema, [str(field) for field in schema]

    def find(self, wanted: _Wanted) -> _Content:
        """What it holds, which is at least what is wanted; made now if need be.

        Raises:
            DemonstrationError: see `map_recorded`.
        """
        if (content := self._unchanged(wanted)) is not None:
            return content
        with locked(self.arrow.parent, "preparing demonstrations in"):
            clean_up(self.arrow.parent)
            return self._unchanged(wanted) or self._hash_again(wanted) or self._write(wanted)

    def _unchanged(self, wanted: _Wanted) -> _Content | None:
        """What it holds, if no file is in another state than when it was hashed."""
        content = self._suitable(wanted)
        if content is None or FileState.of(self.arrow) != content.state:
            return None
        states = {episode.index: episode.state for episode in content.episodes}
        return content if all(FileState.of(path) == states[record.index] for record, path in wanted) else None

    def _hash_again(self, wanted: _Wanted) -> _Content | None:
        """What it holds, if the files are what they were, such as in a copied folder."""
        content = self._suitable(wanted)
        if content is None:
            return None
        if FileState.of(self.arrow) != content.state:
            content.state, found = sha256_of_state(self.arrow)
            if found != content.sha256:
                return None
        episodes = {episode.index: episode for episode in content.episodes}
        for record, path in wanted:
            episode = episodes[record.index]
            if FileState.of(path) != episode.state:
                episode.state, found = check_recorded(path, record)
                if found != episode.sha256:
                    return None
        self._enter(content)
        return content

    def _suitable(self, wanted: _Wanted) -> _Content | None:
        content = _read(self._index)
        if content is None or content.columns != self._columns or not self.arrow.is_file():
            return None
        episodes = {episode.index: episode for episode in content.episodes}
        for record, _ in wanted:
            kept = episodes.get(record.index)
            if kept is None or not kept.is_of(record):
                return None
        return content

    def _write(self, wanted: _Wanted) -> _Content:
        episodes: dict[int, _Kept] = {}
        with atomic_file(self.arrow) as temporary:
            with temporary.open("wb") as file:
                sink = _HashingSink(file)
                with pa.ipc.new_stream(sink, self._schema) as stream:
                    for record, path in wanted:
                        if record.index not in episodes:
                            state, digest = check_recorded(path, record)
                            stream.write_table(self._rows(path).combine_chunks())
                            if FileState.of(path) != state:
                                raise DemonstrationError(
                                    f"{path} is changed by another process; wait until it is done"
                                )
                            episodes[record.index] = _Kept(record.index, record.frames, digest, state)
            if sha256(temporary) != sink.digest.hexdigest():
                raise OSError(f"{self.arrow}: the disk does not give back what was written; use another cache_dir")
        content = _Content(sink.digest.hexdigest(), FileState.of(self.arrow), self._columns, list(episodes.values()))
        self._enter(content)
        return content

    def _rows(self, path: Path) -> pa.Table:
        import datasets

        table = read_table(path)
        try:
            return datasets.table.table_cast(table.select(self._schema.names), self._schema)
        except (KeyError, ValueError, pa.ArrowException) as error:
            raise DemonstrationError(f"{path} is damaged, or of another version ({error}): {RECORD_AGAIN}") from error

    def _enter(self, content: _Content) -> None:
        write_sealed(self._index, {"format_version": FORMAT_VERSION, "content": asdict(content)}, {})


class _HashingSink:
    """A binary file for pyarrow that knows the SHA-256 of what it was given."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.closed = False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def _read(file: Path) -> _Content | None:
    """What is entered of an Arrow file; None if there is nothing that can be used."""
    with suppress(FileNotFoundError, DamagedFileError, KeyError, TypeError):
        content = read_sealed(file, newest=FORMAT_VERSION, sealed_since=1)["content"]
        episodes = [_Kept(**{**episode, "state": FileState(*episode["state"])}) for episode in content["episodes"]]
        return _Content(content["sha256"], FileState(*content["state"]), content["columns"], episodes)
    return None


def _runs(starts: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Rows given as (start, count), with neighbours joined.

    >>> _runs([0, 3, 9], [3, 2, 1])
    [(0, 5), (9, 1)]
    """
    runs: list[tuple[int, int]] = []
    for start, count in zip(starts, counts, strict=True):
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((start, count))
    return runs


def _cache(location: Location, cache_dir: str | Path | None) -> Path:
    """Where the Arrow files of a set are; in a folder that several sets share, each has a folder of its own."""
    if location.folder is not None and cache_dir is None:
        own = location.folder / CACHE
        if os.access(own if own.exists() else location.folder, os.W_OK):
            return own
    name = f"{location.repo_id}@{location.snapshot.name}" if location.folder is None else location.folder.resolve()
    root = Path(cache_dir) if cache_dir is not None else cache_folder() / "demonstrations"
    return root / hashlib.sha256(str(name).encode()).hexdigest()[:16]
