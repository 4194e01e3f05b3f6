"""The folder of one run: what lies where, what is finished, and that a resumed run is the same run.

    config.yaml                  the resolved recipe; a resumed run must agree with it
    state.json                   the finished steps, in order, with their durations in seconds
    demonstrations/              unless the recipe names a folder of its own
    base/                        the base checkpoint in the OpenVLA folder format (a tiny base only)
    stages/stage_01/             trainer checkpoints, log.jsonl (loss curves), rollouts/<task>.json (one cell each)
    adapters/stage_01_<task>/    what `load_policy` reads
    memory/                      replay trajectories and teacher anchors
    videos/stage_01/             rollouts as MP4
    results.json, success.csv, report/index.html
    analysis.json, analysis/     what each stage has kept, and the frames shown (where it was asked for)

Every step writes its product atomically and is then entered in state.json, so a killed run repeats at most the step it
was in, and within training at most the optimiser steps since the last checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from .files import write_json, write_text

STATE_VERSION = 1


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
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self / ".lock").open("w", encoding="utf-8")
        except (NotADirectoryError, FileExistsError) as error:
            raise RunError(f"{self.path} is, or lies below, a file; choose another --output_dir") from error
        except OSError as error:
            raise RunError(f"cannot write to {self.path} ({error.strerror}); choose another --output_dir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise RunError(
                f"another process is using {self.path}; wait for it or choose another --output_dir"
            ) from error

    def _settle(self, config: dict[str, Any], harmless: Iterable[str]) -> None:
        file = self / "config.yaml"
        if file.exists():
            changed = changed_keys(_read_config(file), config, ignore=harmless)
            if changed:
                listed = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
                raise RunError(
                    f"{self.path} holds a run with another configuration; changed:{listed}\n"
                    "Use its configuration to continue it, or another --output_dir to start anew."
                )
        write_text(file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # --- steps ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Any]]:
        """The finished steps, oldest first: name -> {"seconds": ..., and what the step noted}."""
        file = self / "state.json"
        if not file.exists():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version, steps = content["format_version"], content["steps"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{file} is damaged ({error}); restore it, or start anew in another --output_dir"
            ) from error
        if version != STATE_VERSION or not isinstance(steps, dict):
            raise RunError(f"{file} has format {version!r}, this version reads {STATE_VERSION}; update infovla-peft")
        return steps

    def done(self, step: str) -> bool:
        return step in self.state()

    def mark(self, step: str, seconds: float, **notes: Any) -> None:
        """Enter a finished step. Only the main process writes."""
        if self.main_process:
            steps = self.state()
            steps[step] = {"seconds": round(seconds, 2), **notes}
            write_json(self / "state.json", {"format_version": STATE_VERSION, "steps": steps})

    def once(
        self,
        step: str,
        work: Callable[[], Mapping[str, Any] | None],
        *,
        products: Iterable[Path] = (),
        everyone: bool = False,
    ) -> None:
        """Do `work` unless `step` is finished; no process goes on before it is.

        Args:
            work: what it returns is noted in state.json.
            products: what a finished step must have left behind.
            everyone: all processes work (training), or the main one alone.

        Raises:
            RunError: the step is entered as finished, but a product is missing.
        """
        if self.done(step):
            self.require(products, step)
            return
        start = time.monotonic()
        notes = work() if self.main_process or everyone else None
        self.mark(step, time.monotonic() - start, **(notes or {}))
        while not self.done(step):
            time.sleep(0.5)

    def require(self, products: Iterable[Path], step: str) -> None:
        """Raise a RunError if one of the products of a finished step is not there."""
        missing = [product for product in products if not product.exists()]
        if missing:
            raise RunError(
                f"{self.path}: step {step!r} is entered as finished, but {missing[0]} is missing. "
                f"Put it back, or remove {step!r} and every later step from {self / 'state.json'} to repeat them."
            )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{file} is damaged; restore it, or start anew in another --output_dir") from error
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
