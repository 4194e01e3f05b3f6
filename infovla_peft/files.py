"""Atomic files: written beside the target under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_log = logging.getLogger(__name__)


def fsync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each entered in its parent on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def fsync_tree(folder: Path) -> None:
    """`fsync` of a folder and of everything below it."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() or path.is_file():
            fsync(path)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; on a clean exit it is flushed and renamed to `path`, else removed.

    The temporary name keeps the suffix of the target, because many writers choose their format by it.

    Raises:
        OSError: the folder cannot be written or the disk is full; `path` is then as it was before.
    """
    path = Path(path)
    make_folder(path.parent)
    descriptor, name = tempfile.mkstemp(prefix=_prefix(path.stem), suffix=f".tmp{path.suffix}", dir=path.parent)
    temporary = Path(name)
    with _in_use(descriptor):
        try:
            yield temporary
            fsync(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on a clean exit its files are flushed and it replaces `path`.

    An existing folder is moved aside first and removed last, so that one of the two is always whole; a process that is
    killed in between leaves it moved aside, and `clean_up` puts it back.
    """
    path = Path(os.path.abspath(path))
    if os.path.ismount(path) or path == Path.cwd():
        raise OSError(
            f"{path} is the working directory, or a mount point, and cannot be replaced; name a folder below it"
        )
    with scratch_folder(path.parent, path.name) as temporary:
        temporary.chmod(0o755)
        yield temporary
        fsync_tree(temporary)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=_prefix(path.name), suffix=".old", dir=path.parent))
            with _in_use(os.open(old, os.O_RDONLY)):
                path.rename(old / path.name)
                temporary.rename(path)
                fsync(path.parent)
                shutil.rmtree(old)
        else:
            temporary.rename(path)
        fsync(path.parent)


def seen_from(path: Path) -> str:
    """A hint in an error about a path that is not there: where a relative one was looked for."""
    return "" if path.is_absolute() else f" (seen from {Path.cwd()}; a run's is relative to where it was started)"


def check_replaceable(path: Path, names: Iterable[str], what: str) -> None:
    """Raise a FileExistsError if a folder that is to be replaced holds more than these names."""
    found = sorted(set(os.listdir(path)) - set(names)) if path.is_dir() else [path.name] if path.exists() else []
    if found:
        more = ", …" if len(found) > 3 else ""
        raise FileExistsError(
            f"{path} holds what {what} does not ({', '.join(found[:3])}{more}), and would lose it; name another folder"
        )


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder for what is needed for a while, below `parent`; what a kill leaves of it, `clean_up` removes."""
    make_folder(parent)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(name), suffix=".tmp", dir=parent))
    with _in_use(os.open(folder, os.O_RDONLY)):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it; a kill in between leaves it whole, or away from its name."""
    aside = Path(tempfile.mkdtemp(prefix=_prefix(path.name), suffix=".tmp", dir=path.parent))
    path.rename(aside)
    fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; False if another process holds it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise OSError(
            error.errno,
            f"{file.name} cannot be locked ({error.strerror}), and without locks two processes could write the same "
            "files; choose a folder on a local disk, or mount this one with locks",
        ) from error
    return True


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Let one process at a time work in a folder: `what` it does there. Others wait; a killed one holds nothing."""
    make_folder(folder)
    with (folder / ".lock").open("a") as lock:
        if not try_lock(lock):
            _log.warning("another process is %s %s; waiting for it", what, folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was just forked may still have it open


def clean_up(folder: str | os.PathLike[str], *, but: Path | None = None) -> list[Path]:
    """Remove what killed processes have left half written below `folder`, at any depth.

    A living process holds a lock on what it writes, in whichever container it runs; process numbers say nothing.
    A folder that was moved aside and not replaced is put back. Call it holding the lock under which files are written
    there: what another process has just made, and not yet locked, would look abandoned.

    Args:
        but: a folder below it whose files are written under a lock of its own.

    Returns:
        What was put back.
    """
    restored = []
    for path in sorted(Path(folder).rglob(".*"), reverse=True):  # what lies deeper first
        match = re.fullmatch(r"\.(.+)\.p\d+-[^.]+\.(tmp|old)(\.\w+)?", path.name)
        if match is None or (but is not None and path.is_relative_to(but)) or _is_in_use(path):
            continue
        target = path.parent / match[1]
        if match[2] == "old" and (path / match[1]).exists() and not target.exists():
            (path / match[1]).rename(target)
            fsync(path.parent)
            restored.append(target)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return restored


def was_moved_aside(folder: Path) -> bool:
    """Whether a killed process has left `folder` moved aside, so that `clean_up` will put it back."""
    return any(folder.parent.glob(f".{folder.name}.p*.old/{folder.name}"))


def _prefix(name: str) -> str:
    return f".{name}.p{os.getpid()}-"  # mkstemp's own letters follow, without a dot; the number is for the reader


@contextmanager
def _in_use(descriptor: int) -> Iterator[None]:
    """Hold an open file or folder locked, as far as its file system knows locks, and close it."""
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _is_in_use(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True  # removed meanwhile
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True  # also where locks are not known: nobody can tell
    else:
        return False
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write strict JSON (no NaN, no Infinity) atomically, indented by two spaces."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
