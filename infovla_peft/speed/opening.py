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


def open_in_fresh_process(folder: Path, *, input_size: int, batch_size: int) -> Opening:
    """Open a set, draw batches of random frames, and measure.

    Raises:
        RuntimeError: the process failed; the message is what it wrote.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", __name__, str(folder), str(input_size), str(batch_size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that opens {folder} failed:\n{done.stderr}")
    return Opening(**json.loads(done.stdout.splitlines()[-1]))


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


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    print(json.dumps(_measure(folder, *map(int, numbers))._asdict()))
