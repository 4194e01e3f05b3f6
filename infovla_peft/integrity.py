"""Checksums: a JSON file that carries the SHA-256 of itself and of the files it stands for.

    {"format_version": 2, ..., "sha256": {"infovla.json": <of its other content>, "adapter_model.safetensors": ...}}

Names are relative to the JSON file's folder. So a file that was torn, cut off, changed or exchanged is found when it
is read, and named. It protects against accidents, not against somebody who changes the checksum as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .files import write_json
from .reading import parse_json, read_text

SUMS = "sha256"


_CLOCK_TICK = 0.02
"""Seconds: no file system here keeps the time of a change more coarsely (Linux: one timer tick, at most 10 ms)."""


class DamagedFileError(ValueError):
    """A file is not what was written, or of a format that this version cannot read; the message names it."""

    later_format = False
    """Nothing is wrong with the file, and the message says the cure: a later version of the package."""

    def with_cure(self, cure: str) -> str:
        """The message with what mends damage; a file of a later format needs none of it."""
        return str(self) if self.later_format else f"{self}; {cure}"


class FileState(NamedTuple):
    """What changes when a file's content does, without reading it.

    Attributes:
        size: bytes.
        modified, changed: nanoseconds since 1970. `changed` cannot be set back by a program, as `modified` can.
    """

    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileState:
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_state(path: str | os.PathLike[str]) -> tuple[FileState, str]:
    """SHA-256 of a file and its state then: while the state is the same, so is the content.

    Raises:
        DamagedFileError: it was written to meanwhile.
    """
    state = FileState.of(path)
    if abs(time.time() - state.changed / 1e9) < _CLOCK_TICK:  # another write within the tick would not show
        time.sleep(_CLOCK_TICK)
    digest = sha256(path)
    if FileState.of(path) != state:
        raise DamagedFileError(f"{path} is changed by another process while it is read")
    return state, digest


def files_below(path: Path) -> list[Path]:
    """`path` itself if it is a file, else all files below it, sorted."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def checksums(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """Name relative to `folder` → SHA-256."""
    return {Path(os.path.relpath(file, folder)).as_posix(): sha256(file) for file in files}


def write_sealed(path: str | os.PathLike[str], content: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Write `content` as JSON with its own checksum and those of other files, atomically.

    Args:
        files: from `checksums`, relative to the folder in which the JSON file will lie.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(content), allow_nan=False))  # what a reader will see
    plain[SUMS] = dict(files)
    plain[SUMS] = {Path(path).name: _own(plain), **files}
    write_json(path, plain)


def read_sealed(path: str | os.PathLike[str], *, newest: int, sealed_since: int = 2) -> dict[str, Any]:
    """Read a sealed JSON file and check it against its own checksum; `check_files` checks the others.

    Args:
        newest: the latest `format_version` that the caller reads.
        sealed_since: the first one with checksums; older files are taken as they are.

    Returns:
        The content. Its "sha256" holds the other files alone, and is missing if the format knew none.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it is damaged, or of a later format.
    """
    file = Path(path)
    try:
        content = parse_json(read_text(file))
        version = content.get("format_version", 1)
    except (ValueError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{file} is damaged ({error})") from error
    if type(version) is not int or not 1 <= version <= newest:
        unread = DamagedFileError(
            f"{file} has format {version!r:.40}, this version of infovla-peft reads up to {newest}; update the package"
        )
        unread.later_format = type(version) is int and version > newest
        raise unread
    sums = content.get(SUMS)
    if sums is None and version < sealed_since:
        return dict(content)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise DamagedFileError(f"{file} is damaged (it has lost its checksums)")
    own = sums.pop(file.name, None)
    if own is None and version < sealed_since:
        return dict(content)
    if own != _own(content):
        raise DamagedFileError(f"{file} is damaged (its content does not match its checksum)")
    return dict(content)


def damaged(folder: Path, sums: Mapping[str, str]) -> list[Path]:
    """Those files of `sums` (names relative to `folder` → SHA-256) that are missing or changed."""
    paths = {folder / name: value for name, value in sums.items()}
    return [path for path, value in paths.items() if not path.is_file() or sha256(path) != value]


def check_files(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise a DamagedFileError that names the first file which is missing or changed, see `damaged`."""
    for path in damaged(folder, sums):
        raise DamagedFileError(f"{path} is {'damaged' if path.exists() else 'missing'}")


def _own(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
