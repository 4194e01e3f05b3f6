"""Jobs in processes of their own, which may die or hang: such a process is replaced, and its job begins anew."""

from __future__ import annotations

import copy
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from .headless import ONE_THREAD

Job = TypeVar("Job")
Result = TypeVar("Result")

MAX_REPLACEMENTS = 2
"""Processes that one job may cost; a third that is lost with it says that it is the job's fault."""
_FAREWELL = 10.0
"""Seconds that a process may take to end."""
_log = logging.getLogger(__name__)


class LostJobError(RuntimeError):
    """A job has cost one process after another; the message names it."""


NO_MORE_PATH = "import sys; sys.path[:1] == [''] and sys.path.pop(0)"
"""What a process started by `-c` runs first: it would import what lies in the working directory before all else."""


def same_path() -> str:
    """PYTHONPATH for a process that is to import what this one imports."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def fresh_interpreter(command: str, inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a Python process with one thread, as multiprocessing's "spawn".

    It does not import the caller's main module again, so that scripts without a __main__ guard and notebooks work.

    Args:
        command: what it executes.
        inherited: file descriptors that it keeps.
    """
    environment = ONE_THREAD | dict(os.environ) | {"PYTHONPATH": same_path()}
    return subprocess.Popen(
        [sys.executable, "-c", f"{NO_MORE_PATH}; {command}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=inherited,
    )


def end_process(process: subprocess.Popen[bytes]) -> int:
    """Wait until a simulation's process has ended, and kill it if it does not; its exit code.

    Even a killed process may stay, in a driver's call that nothing interrupts. Nobody waits for it then.
    """
    with suppress(subprocess.TimeoutExpired):
        return process.wait(_FAREWELL)
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        return process.wait(_FAREWELL)
    _log.warning("process %d of a simulation cannot be killed; it is left to itself", process.pid)
    return -signal.SIGKILL


def exit_text(code: int) -> str:
    """How a process ended: "died by SIGKILL (exit code -9)"."""
    killed = f" by {signal.Signals(-code).name}" if code < 0 else ""
    return f"died{killed} (exit code {code})"


def work_off(
    work: Callable[[Job, Callable[[], None]], Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    patience: float,
    name: Callable[[Job], str] = str,
) -> Generator[Result, None, None]:
    """Do jobs in several processes; results come as they are ready.

    Args:
        work: importable by its name; called with a job and with what it has to call now and then, to say that it gets
            on. A job must give the same result when it is done again.
        jobs: what is to be done, begun in this order.
        workers: processes.
        patience: seconds without a sign of life after which a process counts as hung.
        name: of a job, for messages.

    Raises:
        LostJobError: a job has cost three processes.
        Exception: what `work` raised.
    """
    waiting = deque(jobs)
    processes: list[_Process] = []
    try:
        while True:
            for process in processes:
                if process.job is None and waiting:
                    process.begin(waiting.popleft())
            while waiting and len(processes) < workers:
                processes.append(_Process(work, patience, name))
                processes[-1].begin(waiting.popleft())
            busy = {process.connection: process for process in processes if process.job is not None}
            if not busy:
                return
            ready = wait(list(busy), max(0.0, min(process.patience for process in busy.values())))
            for connection, process in busy.items():
                if connection in ready or process.patience <= 0:
                    yield from process.receive()
    finally:
        for process in processes:
            process.close()


class _Process:
    """The parent's side of one process."""

    def __init__(self, work: Callable[..., Any], patience: float, name: Callable[[Any], str]) -> None:
        self._work, self._patience, self._name = work, patience, name
        self.job: Any = None
        self._lost = 0
        self._launch()

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            inherited = (theirs.fileno(),)
            self.process = fresh_interpreter(f"from {__name__} import _serve; _serve({inherited[0]})", inherited)
        self.connection: Connection[Any, Any] = Connection(ours.detach())

    def begin(self, job: Any) -> None:
        self.job, self._lost = job, 0
        self._send()

    def _send(self) -> None:
        self._deadline = time.monotonic() + self._patience
        with suppress(OSError):  # its death shows when its answer is waited for
            self.connection.send((self._work, self.job))

    @property
    def patience(self) -> float:
        """Seconds that the next sign of life may still take."""
        return self._deadline - time.monotonic()

    def receive(self) -> list[Any]:
        """The result, if that is what has come; a lost process is replaced."""
        try:
            if not self.connection.poll():
                self._replace(f"gave no answer within {self._patience:.0f} s")
                return []
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            self._replace(None)
            return []
        self._deadline = time.monotonic() + self._patience
        if kind == "failed":
            raise content
        if kind == "alive":
            return []
        self.job = None
        return [content]

    def _replace(self, problem: str | None) -> None:
        self.connection.close()
        if problem is not None:
            self.process.kill()
        code = end_process(self.process)
        problem = problem or exit_text(code)
        self._lost += 1
        if self._lost > MAX_REPLACEMENTS:
            raise LostJobError(
                f"the process for {self._name(self.job)} {problem}, as {MAX_REPLACEMENTS} others before it"
            )
        _log.warning("the process for %s %s; another one begins anew", self._name(self.job), problem)
        self._launch()
        self._send()

    def close(self) -> None:
        """End the process, whatever it does: what it has not sent is worth nothing."""
        self.connection.close()
        self.process.kill()
        end_process(self.process)


def _serve(descriptor: int) -> None:
    """The process: jobs in, signs of life and results out, until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this one
    connection: Connection[Any, Any] = Connection(descriptor)
    with suppress(EOFError, ConnectionError):
        while True:
            work, job = connection.recv()
            try:
                answer = "done", work(job, lambda: connection.send(("alive", None)))
            except (EOFError, ConnectionError):
                raise
            except Exception as error:
                _send_error(connection, error)
                continue
            connection.send(answer)


def _send_error(connection: Connection[Any, Any], error: Exception) -> None:
    """The error itself, or, where it cannot be made again from its arguments, its text."""
    try:
        connection.send(("failed", copy.copy(error)))
    except ConnectionError:
        raise
    except Exception:
        connection.send(("failed", RuntimeError("".join(traceback.format_exception(error)))))
