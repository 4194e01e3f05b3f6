"""SIGTERM and Ctrl-C: a training ends its step and saves a checkpoint first, all else stops where it is.

Every step of a run is written so that it may be cut off anywhere; only a training has something to lose, the optimiser
steps since its last checkpoint. A second signal does not wait for them.

`accelerate launch` of one process waits for it and passes no signal on: a scheduler's SIGTERM ends the launcher alone.
So the process asks Linux to be told of the launcher's end, and takes that for the signal.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end. Not an `Exception`, so that nobody takes it for a failure and goes on.

    Args:
        number: of the signal.
        saved: the checkpoint that was saved for it.
    """

    def __init__(self, number: int, saved: str | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.saved = number, saved

    @property
    def exit_code(self) -> int:
        """As a shell reports a process ended by this signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class _Pending:
    """What this process was asked for, and whether it may wait."""

    def __init__(self) -> None:
        self.deferrals = 0
        self.number: int | None = None
        self.launcher: int | None = None

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if self.launcher is not None and os.getppid() != self.launcher:
            self.launcher = None  # its end is told once
            if self.number is not None:
                return  # both got the signal that ended it
        if not self.deferrals or self.number is not None:
            raise Stopped(number)
        self.number = number
        print("\ninfovla: stopping after this step (once more: at once) ...", file=sys.stderr, flush=True)


_pending = _Pending()


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise `Stopped`, within `deferred_stop` only when asked. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _pending.receive) for number in SIGNALS}
    _pending.launcher = _launcher()
    try:
        if _pending.launcher is not None:
            _tell_of_parents_end(signal.SIGTERM)
            if os.getppid() != _pending.launcher:
                _pending.receive(signal.SIGTERM, None)  # it was gone before it could be told of
        yield
    finally:
        if _pending.launcher is not None:
            _tell_of_parents_end(0)
            _pending.launcher = None
        for number, handler in before.items():
            signal.signal(number, handler)
        _pending.number = None


@contextmanager
def deferred_stop() -> Iterator[None]:
    """Within it a first signal waits until `requested_stop` is looked at."""
    _pending.deferrals += 1
    try:
        yield
    finally:
        _pending.deferrals -= 1


def requested_stop() -> int | None:
    """The signal that waits, if any."""
    return _pending.number


def _launcher() -> int | None:
    """This process's parent, if that is `accelerate launch` on Linux."""
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    launches = any(Path(word).name in ("accelerate", "accelerate-launch") or "accelerate.commands" in word
                   or word.endswith("accelerate/commands/launch.py") for word in words[:4])  # fmt: skip
    return parent if launches else None


def _tell_of_parents_end(number: int) -> None:
    """Have Linux send this signal when the parent ends; 0: none."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, see prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)
