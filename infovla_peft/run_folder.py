"""The folder of one run: what lies where, what is finished, and that a resumed run is the same run.

    config.yaml                  the resolved recipe; a resumed run must agree with it
    state.json                   the finished steps, in order, with their durations in seconds; checksums of products
    demonstrations/              unless the recipe names a folder of its own
    base/                        the base checkpoint in the OpenVLA folder format (a tiny base only)
    stages/stage_01/             trainer checkpoints, log.jsonl (loss curves), rollouts/<task>.json (one cell each)
    adapters/stage_01_<task>/    what `load_policy` reads
    merged/stage_01_<task>/      of `merge`: all adapters so far in one, which is what `load_policy` then reads
    memory/                      replay trajectories and teacher anchors
    videos/stage_01/             rollouts as MP4
    results.json, success.csv, report/index.html
    analysis.json, analysis/     what each stage has kept, and the frames shown (where it was asked for)

Every step writes its product atomically and is then entered in state.json, so a killed run repeats at most the step it
was in, and within training at most the optimiser steps since the last checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

import yaml

from .files import clean_up, make_folder, seen_from, try_lock, write_text
from .integrity import SUMS, DamagedFileError, check_files, checksums, files_below, read_sealed, write_sealed
from .reading import read_yaml

STATE = "state.json"
RESTORE = "restore it from a copy, or start anew in another --output_dir"
_SUM = "# sha256: "

STATE_VERSION = 2  # 1 had no checksums
_REPLACED = ("base", "memory", "adapters", "merged", "report", "results.json", "success.csv")
"""What a run writes anew, and would take from somebody else."""
_UNFINISHED = "unfinished"
"""Key of state.json: step -> seconds of its attempts that were stopped."""
HARMLESS = frozenset(
    {
        "output_dir",
        "demonstration_workers",
        "eval_workers",
        "videos_per_task",
        "analyse",
        "cache_images",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "logging_dir",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "log_level",
        "local_rank",
        "ddp_timeout",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_always_push",
        "hub_token",
        "grad_norm_limit",
        "log_gradients",
    }
)
"""What may differ between a run and its continuation: none of it changes a number by more than rounding does."""


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what to do."""


class RunFolder:
    """Paths, finished steps and the configuration of one run.

    Args:
        path: the run's folder; made on `open` if it does not exist.
        main_process: whether this process does the writing. The others wait for it (`once`), by looking at state.json
            rather than in a collective operation: a rollout may take longer than any time-out of torch.distributed.
    """

    def __init__(self, path: str | os.PathLike[str], *, main_process: bool = True) -> None:
        self.path = Path(path)
        self.main_process = main_process
        self._lock: IO[str] | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def base(self) -> Path:
        return self / "base"

    @property
    def memory(self) -> Path:
        return self / "memory"

    @property
    def results(self) -> Path:
        return self / "results.json"

    def stage(self, index: int) -> Path:
        return self.path / "stages" / f"stage_{index:02d}"

    def cell(self, index: int, task: str) -> Path:
        return self.stage(index) / "rollouts" / f"{task}.json"

    def videos(self, index: int) -> Path:
        return self.path / "videos" / f"stage_{index:02d}"

    def adapter(self, name: str) -> Path:
        return self.path / "adapters" / name

    def merged(self, name: str) -> Path:
        return self.path / "merged" / name

    # --- opening and the configuration ---------------------------------------------------------------------------

    def open(self, config: Mapping[str, Any], *, harmless: Iterable[str] = ()) -> RunFolder:
        """Create the folder, or check that a run which is already there has the same configuration.

        Args:
            config: flat, YAML-compatible mapping of everything that was chosen.
            harmless: keys that may differ between a run and its continuation.

        Raises:
            RunError: another configuration is stored here, another process is using the folder, or it cannot be
                written.
        """
        if self.main_process:
            self._acquire()
            try:
                self._settle(yaml.safe_load(yaml.safe_dump(dict(config))), harmless)  # tuples -> lists, as in the file
            except BaseException:
                self.close()
                raise
        return self

    def _acquire(self) -> None:
        try:
            make_folder(self.path)
            lock = (self / ".lock").open("a+", encoding="utf-8")
        except (NotADirectoryError, FileExistsError) as error:
            raise self._no_folder() from error
        except OSError as error:
            raise RunError(f"cannot write to {self.path} ({error.strerror}); choose another --output_dir") from error
        try:
            mine = try_lock(lock)
        except OSError as error:
            lock.close()
            raise RunError(str(error.strerror)) from error
        if not mine:
            with lock:
                owner = _read_owner(lock)
            raise RunError(
                f"another process is using {self.path}: {owner}; wait for it or choose another --output_dir"
            )
        self._lock = lock
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}, started {_now()}: {shown_command(sys.argv)}")
            lock.flush()
            clean_up(self.path)
        except OSError:
            self.close()
            raise
        _held.add(self)

    def _no_folder(self) -> RunError:
        return RunError(f"{self.path} is, or lies below, a file; choose another --output_dir")

    def _settle(self, config: dict[str, Any], harmless: Iterable[str]) -> None:
        file = self / "config.yaml"
        if not file.exists() and not (self / STATE).exists():
            foreign = [name for name in _REPLACED if (self / name).exists()]
            if foreign:
                raise RunError(
                    f"{self.path} holds no run, and files that a run would replace ({', '.join(foreign)}); choose "
                    "another --output_dir"
                )
        if file.exists():
            before = _read_config(file)
            # An option that only one version of a library knows, and that is off, changes nothing.
            off = {key for key in {*before, *config} if key not in before or key not in config}
            off = {key for key in off if not before.get(key) and not config.get(key)}
            changed = changed_keys(before, config, ignore={*harmless, *off})
            if changed:
                listed = "".join(f"\n  {key}: {old!r:.200} -> {new!r:.200}" for key, (old, new) in changed.items())
                raise RunError(
                    f"{self.path} holds a run with another configuration; changed:{listed}\n"
                    "Use its configuration to continue it, or another --output_dir to start anew."
                )
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_text(file, f"{text}{_SUM}{hashlib.sha256(text.encode()).hexdigest()}\n")

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock is not None:
            with suppress(OSError):
                self._lock.truncate(0)
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # a child that was just forked may still have it open
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # --- steps ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Any]]:
        """The finished steps, oldest first: name -> {"seconds": ..., and what the step noted}."""
        steps: dict[str, dict[str, Any]] = self._read_state()["steps"]
        return steps

    def _read_state(self) -> dict[str, Any]:
        try:
            content = read_sealed(self / STATE, newest=STATE_VERSION)
            tables = (content["steps"], content.get(_UNFINISHED, {}))
            if not all(isinstance(table, dict) for table in tables) or not content["format_version"]:
                raise DamagedFileError(f"{self / STATE} is damaged (its steps are none)")
        except FileNotFoundError:
            return {"steps": {}, SUMS: {}, _UNFINISHED: {}}
        except NotADirectoryError as error:
            raise self._no_folder() from error
        except KeyError as error:
            raise RunError(f"{self / STATE} is damaged (it lacks {error}); {RESTORE}") from error
        except DamagedFileError as error:
            raise RunError(error.with_cure(RESTORE)) from error
        return {SUMS: {}, _UNFINISHED: {}, **content}

    def _write_state(self, content: Mapping[str, Any]) -> None:
        kept = {name: content[name] for name in ("steps", _UNFINISHED) if content[name] or name == "steps"}
        write_sealed(self / STATE, {"format_version": STATE_VERSION, **kept}, content[SUMS])

    def done(self, step: str) -> bool:
        return step in self.state()

    def mark(self, step: str, seconds: float, *, sealed: Iterable[Path] = (), **notes: Any) -> None:
        """Enter a finished step. Only the main process writes.

        Args:
            seconds: that it took; those of attempts before that were stopped are added, not of one that failed or
                was killed outright.
            sealed: files and folders whose checksums are entered with it.
        """
        if not self.main_process:
            return
        content = self._read_state()
        sums = content[SUMS]
        for product in sealed:
            name = product.relative_to(self.path).as_posix()
            sums = {key: value for key, value in sums.items() if key != name and not key.startswith(f"{name}/")}
            sums |= checksums(files_below(product), self.path)
        seconds += content[_UNFINISHED].pop(step, 0.0)
        content["steps"][step] = {"seconds": round(seconds, 2), **notes}
        self._write_state({**content, SUMS: sums})

    def _add_unfinished(self, step: str, seconds: float) -> None:
        """What a step that was stopped has taken so far counts when it is finished."""
        if self.main_process:
            content = self._read_state()
            content[_UNFINISHED][step] = round(seconds + content[_UNFINISHED].get(step, 0.0), 2)
            self._write_state(content)

    def checksums(self) -> dict[str, str]:
        """Of the sealed products of finished steps: name relative to the folder → SHA-256."""
        sums: dict[str, str] = self._read_state()[SUMS]
        return sums

    def seals(self) -> bool:
        """Whether a version that keeps checksums has written this run; not so if state.json cannot be read."""
        try:
            return bool(self._read_state().get("format_version", STATE_VERSION) >= STATE_VERSION)
        except RunError:
            return False

    def check(self, product: Path) -> None:
        """Raise a RunError that names a file of a sealed product which is not what was written.

        What lies outside of the folder, such as demonstrations that runs share, is not sealed with it.
        """
        if not product.is_relative_to(self.path):
            return
        name = product.relative_to(self.path).as_posix()
        mine = {key: value for key, value in self.checksums().items() if key == name or key.startswith(f"{name}/")}
        try:
            check_files(self.path, mine)
        except DamagedFileError as error:
            raise RunError(error.with_cure(RESTORE)) from error

    def once(
        self,
        step: str,
        work: Callable[[], Mapping[str, Any] | None],
        *,
        products: Iterable[Path] = (),
        sealed: Iterable[Path] = (),
        everyone: bool = False,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        """Do `work` unless `step` is finished; no process goes on before it is.

        Args:
            work: what it returns is noted in state.json.
            products: what a finished step must have left behind.
            sealed: those of them whose checksums are kept.
            everyone: all processes work (training), or the main one alone.
            gone: whether something that a finished step has left was deleted, so that `work` makes it again.

        Raises:
            RunError: the step is entered as finished, but a product is missing.
        """
        before = self.state().get(step)
        if before is not None and not gone():
            self.require(products, step)
            return
        start = time.monotonic()
        try:
            notes = work() if self.main_process or everyone else None
        except KeyboardInterrupt:  # a stop; an error leaves everything as it was
            with suppress(OSError, RunError):
                self._add_unfinished(step, time.monotonic() - start)
            raise
        seconds = time.monotonic() - start + (before or {}).get("seconds", 0.0)
        self.mark(step, seconds, sealed=sealed, **(notes or {}))
        while not self.done(step) or gone():
            time.sleep(0.5)

    def require(self, products: Iterable[Path], step: str) -> None:
        """Raise a RunError if one of the products of a finished step is not there."""
        missing = [product for product in products if not product.exists()]
        if missing:
            raise RunError(
                f"{self.path}: step {step!r} is entered as finished, but {missing[0]} is missing"
                f"{seen_from(missing[0])}. Put it back from a copy, or start anew in another --output_dir"
            )


_held: WeakSet[RunFolder] = WeakSet()


def _let_go() -> None:
    # A forked child (a DataLoader's worker) must not hold a folder when this process is killed.
    for folder in _held:
        if folder._lock is not None:
            folder._lock.close()
            folder._lock = None


os.register_at_fork(after_in_child=_let_go)


def config_is_sealed(file: Path) -> bool | None:
    """Whether a run's config.yaml matches its checksum; None if an earlier version wrote it without one."""
    text, mark, stored = file.read_text(encoding="utf-8").rpartition(_SUM)
    return hashlib.sha256(text.encode()).hexdigest() == stored.strip() if mark else None


def _read_owner(lock: IO[str]) -> str:
    with suppress(OSError, UnicodeDecodeError):
        lock.seek(0)
        return lock.read(1000).strip() or "unknown"
    return "unknown"


def shown_command(arguments: Iterable[str]) -> str:
    """A command line as others may see it: without tokens.

    >>> shown_command(["train", "--hub_token", "hf_x", "--push_to_hub_token=hf_y", "--seed", "1"])
    'train --hub_token *** --push_to_hub_token=*** --seed 1'
    """
    shown: list[str] = []
    secret = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if secret and not argument.startswith("--"):
            shown.append("***")
        elif "token" in name.lower() and equals:
            shown.append(f"{name}=***")
        else:
            shown.append(re.sub(r"\bhf_\w{20,}", "***", argument))
        secret = argument.startswith("--") and "token" in name.lower() and not equals
    return " ".join(shown)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _read_config(file: Path) -> dict[str, Any]:
    content = read_yaml(file, error=RunError, cure=RESTORE)
    if not isinstance(content, dict):
        raise RunError(f"{file} holds no configuration; restore it, or start anew in another --output_dir")
    return content


def changed_keys(
    old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with both values (None where a key is absent).

    >>> changed_keys({"seed": 0, "suite": "libero_goal"}, {"seed": 1, "suite": "libero_goal"})
    {'seed': (0, 1)}
    """
    keys = [key for key in {**old, **new} if key not in set(ignore)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}
