"""Jobs that lose their process, for `test_jobs.py`; importable where no test runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

Job = tuple[str, int, Path]


class OddError(RuntimeError):
    """Cannot be made again from its `args`."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(f"{text} {number}")


def square(job: Job, alive: Callable[[], None]) -> int:
    """The square of a number; before, the process is lost as often as the job says: die2, hang1, fail, odd, slow."""
    how, number, folder = job
    kind, times = how.rstrip("0123456789"), int(how.lstrip("abcdefghijklmnopqrstuvwxyz") or 0)
    (folder / f"{number}.{time.monotonic_ns()}").touch()
    if len(list(folder.glob(f"{number}.*"))) <= times:
        if kind == "hang":
            (folder / "hung").touch()
        os.kill(os.getpid(), {"die": signal.SIGKILL, "crash": signal.SIGSEGV, "hang": signal.SIGSTOP}[kind])
    if kind == "odd":
        raise OddError("as asked", 7)
    if kind == "fail":
        raise ZeroDivisionError("as asked")
    for _ in range(4 if kind == "slow" else 0):
        alive()
        time.sleep(0.1)
    return number**2
