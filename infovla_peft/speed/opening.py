"""How long a set of demonstrations takes to open and what memory beyond the page cache: in a process of its own."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_BATCHES = 20


class Opening(NamedTuple):
    """What a fresh process found.

    Attributes:
        seconds: from the call of `load_demonstrations` to the first sample that could be drawn; without imports.
        resident: bytes of memory of its own (not of mapped files) by which the process grew over that and twenty
            batches, beyond what the same took for a single episode.
        batch: bytes of one batch as the model gets it.
    """

    seconds: float
    resident: int
    batch: int


def seconds_in_fresh_process(folder: Path, *, cache: Path | None = None) -> float:
    """Open a set in a process that has opened nothing before.

    Args:
        cache: for its Arrow files; an empty folder, so that they are made. None: the set's own.

    Returns:
        Seconds from the call of `load_demonstrations` to the first decoded frame; without imports.

    Raises:
        RuntimeError: the process failed; the message is what it wrote.
    """
    seconds: float = _fresh_process(str(folder), *([str(cache)] if cache else []))
    return seconds


def evict(folder: Path) -> None:
    """Let the page cache forget the files below a folder, so that they are read from the disk again.

    Linux does so for whole files that no process has mapped.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def open_in_fresh_process(folder: Path, *, input_size: int, batch_size: int) -> Opening:
    """Open a set, draw batches of random frames, and measure.

    Raises:
        RuntimeError: the process failed; the message is what it wrote.
    """
    return Opening(*_fresh_process(str(folder), str(input_size), str(batch_size)))


def _fresh_process(*arguments: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", __name__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that opens {arguments[0]} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def resident_bytes() -> int:
    """Memory in use by this process that belongs to no file; what it has freed is given back first, where it can be.

    Raises:
        FileNotFoundError: not on Linux.
    """
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def _measure(folder: str, input_size: int, batch_size: int) -> Opening:
    import datasets

    from ..data.demonstrations import DemonstrationManifest, load_demonstrations
    from .reading import reader, tiny_model

    datasets.disable_progress_bars()
    first = next(iter(DemonstrationManifest.load(folder).tasks))
    rng = np.random.default_rng(0)
    _, collator = tiny_model(input_size)

    def read(frames: Any) -> tuple[int, int]:
        read_batch, rows = reader(frames, collator)
        highest = 0
        for _ in range(_BATCHES):
            batch = read_batch(rng.integers(0, rows, batch_size))
            highest = max(highest, resident_bytes())
        return highest, sum(tensor.nbytes for tensor in batch.values())

    before, _ = read(load_demonstrations(folder, [first], episodes=1))
    start = time.perf_counter()
    frames = load_demonstrations(folder)
    reader(frames, collator)
    seconds = time.perf_counter() - start
    after, batch = read(frames)
    return Opening(seconds, after - before, batch)


def _time(folder: str, cache: str | None = None) -> float:
    import datasets

    from ..data.demonstrations import load_demonstrations

    datasets.disable_progress_bars()
    start = time.perf_counter()
    load_demonstrations(folder, cache_dir=cache)[0]
    return time.perf_counter() - start


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    measured = _measure(folder, *map(int, rest)) if len(rest) == 2 else _time(folder, *rest)
    print(json.dumps(measured))
