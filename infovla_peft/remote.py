"""Talking to the Hub: what a repository holds, what of it is needed here, and errors that say what to do.

Files come into huggingface_hub's own cache and are found there again without a network. A repository is looked at
before anything of it is read: one that holds a pickle, or a path that leads out of its folder, is refused as a whole.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .adapter_files import AdapterError
from .reading import is_inside

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

Value = TypeVar("Value")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz")
"""Endings of files that run code when they are read, or that may."""
RETRIES = 5
_WAIT = 1.0  # seconds before the first retry; doubled each time
_LONGEST_WAIT = 60.0


class HubError(RuntimeError):
    """The Hub did not do what was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Access:
    """How to reach the Hub, in the words of huggingface_hub.

    Attributes:
        token: None is that of `hf auth login`; never shown.
        cache_dir: None is huggingface_hub's own.
        local_files_only: take what is in the cache and ask nobody.
    """

    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, as far as it is in the cache.

    Attributes:
        repo_id, commit: what it is.
        folder: where its files lie.
        files: names of all its files, None where the Hub could not be asked (offline).
        access: for further downloads.
    """

    repo_id: str
    commit: str
    folder: Path
    files: tuple[str, ...] | None
    access: Access = Access()

    def fetch(self, *patterns: str) -> Path:
        """Download the files that match, unless they are there; returns `folder`.

        Raises:
            FileNotFoundError: they are not in the cache, and the Hub cannot be reached.
            HubError: the Hub refuses, or fails again and again.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        with explained(self.repo_id):
            try:
                snapshot_download(
                    self.repo_id,
                    revision=self.commit,
                    allow_patterns=list(patterns),
                    token=self.access.token,
                    cache_dir=self.access.cache_dir,
                    local_files_only=self.files is None,
                )
            except LocalEntryNotFoundError as error:
                raise FileNotFoundError(
                    f"of {self.repo_id} not all that is needed is in the cache ({patterns[0]} and what belongs to "
                    "it), and the Hub cannot be reached; give the command once with a network, and without "
                    "HF_HUB_OFFLINE and local_files_only"
                ) from error
        return self.folder

    def __repr__(self) -> str:
        return f"Snapshot({self.repo_id!r}, {self.commit!r})"


def open_snapshot(
    repo_id: str, patterns: Sequence[str], *, revision: str | None = None, access: Access | None = None
) -> Snapshot:
    """Look at a repository and download the files that match; out of the cache where the Hub cannot be reached.

    Where the connection breaks, the cache is looked at first, and the Hub asked again only if nothing is there.

    Raises:
        FileNotFoundError: no such repository or revision, or nothing of it in the cache.
        HubError: the Hub refuses, or fails again and again.
        AdapterError: a file name leads out of the repository.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    access = access or Access()

    def snapshot(files: tuple[str, ...] | None) -> Snapshot:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(patterns),
            token=access.token,
            cache_dir=access.cache_dir,
            local_files_only=files is None,
        )
        return Snapshot(repo_id, Path(folder).name, Path(folder), files, access)

    def ask() -> ModelInfo:
        return HfApi(token=access.token).model_info(repo_id, revision=revision)

    with explained(repo_id):
        if access.local_files_only:
            return snapshot(None)
        try:
            info = retried(ask, when=_overloaded)
        except Exception as error:
            if not _unreachable(error):
                raise
            try:
                return snapshot(None)
            except LocalEntryNotFoundError:
                if not broken_connection(error):
                    raise
            try:
                info = retried(ask)
            except Exception as again:
                if not _unreachable(again):
                    raise
                return snapshot(None)  # which says that nothing is there
        files = tuple(sibling.rfilename for sibling in info.siblings or ())
        check_file_names(files, repo_id)
        return snapshot(files)


def check_file_names(files: Sequence[str], where: str | os.PathLike[str]) -> None:
    """Refuse file names that lead out of their folder.

    >>> check_file_names(["stage_01/infovla.json"], "user/name")
    >>> check_file_names(["../infovla.json"], "user/name")
    Traceback (most recent call last):
    ...
    infovla_peft.adapter_files.AdapterError: user/name names a file outside itself, '../infovla.json'; it is not loaded
    """
    for name in files:
        if not is_inside(name):
            raise AdapterError(f"{where} names a file outside itself, {name!r}; it is not loaded")


def check_no_pickles(files: Sequence[str], where: str | os.PathLike[str], *, but: Container[str] = ()) -> None:
    """Refuse an adapter repository that holds files which run code when they are read.

    Args:
        but: names of files that may lie there, as nobody reads them.

    >>> check_no_pickles(["adapter_model.safetensors", "stage_01/adapter_model.bin"], "user/name")
    Traceback (most recent call last):
    ...
    infovla_peft.adapter_files.AdapterError: user/name holds stage_01/adapter_model.bin, which can run code when it \
is read; adapters are safetensors and JSON. It is not loaded: ask its owner to remove the file
    """
    for name in files:
        if name.lower().endswith(PICKLES) and name not in but:
            raise AdapterError(
                f"{where} holds {name}, which can run code when it is read; adapters are safetensors and JSON. It is "
                "not loaded: ask its owner to remove the file"
            )


def check_repo_id(name: str) -> None:
    """Refuse what cannot be the name of a repository, without asking the Hub.

    Raises:
        ValueError: it is neither `name` nor `user/name`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no Hub id user/name ({error})") from error


def api(token: str | bool | None) -> HfApi:
    """The Hub's client; `token` None is the one of `hf auth login`."""
    from huggingface_hub import HfApi

    from . import __version__

    return HfApi(token=token, library_name="infovla-peft", library_version=__version__)


def retried(ask: Callable[[], Value], *, when: Callable[[BaseException], bool] | None = None) -> Value:
    """`ask()`, again after a pause while the Hub is overloaded (429, 5xx) or the connection breaks.

    huggingface_hub does so for files, not for creating and committing.

    Args:
        when: which errors are worth another try; None for these.
    """
    for attempt in range(RETRIES + 1):
        try:
            return ask()
        except Exception as error:
            if attempt == RETRIES or not (when or _passing)(error):
                raise
            time.sleep(_pause(error, attempt))
    raise AssertionError("unreachable")


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    # The uploads of hf_xet have no response, only words: "... HTTP status client error (404 Not Found), ..."
    said = re.search(r"HTTP status \w+ error \((\d{3})\b", str(error)) if isinstance(error, ConnectionError) else None
    return int(said[1]) if said else None


def broken_connection(error: BaseException) -> bool:
    """Whether the connection to the Hub broke, or there is none; not where the user wants none."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    # The client's own HTTP library is an implementation detail of huggingface_hub (requests, then httpx).
    transport = type(error).__module__.split(".")[0] in ("httpx", "httpcore", "httpx2", "httpcore2", "requests")
    return not isinstance(error, OfflineModeIsEnabled) and (transport or isinstance(error, ConnectionError))


def _overloaded(error: BaseException) -> bool:
    return _status(error) in (408, 429, 500, 502, 503, 504)


def _passing(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of an upload
    return _overloaded(cause) or (_status(cause) is None and broken_connection(cause))


def _unreachable(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled) or _passing(error)


def _pause(error: BaseException, attempt: int) -> float:
    response = getattr(error, "response", None)
    wanted = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(wanted) if wanted.isdigit() else _WAIT * 2**attempt, _LONGEST_WAIT)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one message with a cure.

    Raises:
        FileNotFoundError: no such repository, revision or file; nothing in the cache.
        HubError: everything else.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"{repo_id}: not signed in to the Hub; `hf auth login`, or pass a `token`") from error
    except GatedRepoError as error:
        raise HubError(f"{repo_id} is gated: ask for access on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the Hub has no repository {repo_id}, or you have no access to it; check the name, and `hf auth login` "
            "(or `token`) for a private one"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} has no such revision; leave `revision` out for its main branch") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{repo_id} is no folder here, is not in the cache, and the Hub cannot be reached; check the name, the "
            "network, and that neither HF_HUB_OFFLINE nor local_files_only is set"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} lacks a file: {_first_line(error)}") from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id!r} is no folder here and no Hub id user/name ({error})") from error
    except (HfHubHTTPError, RuntimeError, OSError) as error:
        if isinstance(error, (HubError, FileNotFoundError)):
            raise
        raise HubError(f"{repo_id}: {_reason(error)}") from error
    except Exception as error:
        if not broken_connection(error):
            raise
        raise HubError(f"{repo_id}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = _status(cause)
    known = {
        401: "not signed in, or the Hub does not accept the token; `hf auth login` again, or pass another `token`",
        403: "the token may not do this; use one with write access to this repository, or another name",
        409: "the Hub reports a conflict; somebody changes the repository at the same time, give the command again",
        412: "the repository was changed at the same time; give the command again",
        429: "the Hub allows no more requests for now; give the command again later, it continues",
    }
    if status in known:
        return known[status]
    if status == 404 and isinstance(cause, ConnectionError):
        return (
            "this Hub takes no uploads by Xet (404), as a mirror or a Hub of one's own may not; "
            "`export HF_HUB_DISABLE_XET=1` and give the command again"
        )
    if status is not None and status >= 500:
        return f"the Hub fails ({status}); give the command again later, it continues"
    if status is None and broken_connection(cause):
        return "the connection to the Hub broke; give the command again, it continues"
    return _first_line(cause)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
