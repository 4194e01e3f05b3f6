"""The queue of a benchmark's runs: each a process of its own, some at once, restartable, safe against a second queue.

<run>/recipe.yaml    what the run was started with
<run>/log.txt        what it printed, all attempts one after another
<run>/queue.json     when it was last started, and how that ended
<run>/.queue.lock    held while it is running, by whoever runs it
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import yaml

from .benchmark import Job, Progress, RunKey, progress, take_over_base
from .files import try_lock, write_json, write_text
from .run_folder import RunError

Command = Callable[[Job, Path], Sequence[str]]
"""A job and its recipe file -> the command that runs it."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
LOG_LINES = 15
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Failure:
    """A run that ended badly, and the last lines of its log."""

    job: Job
    reason: str
    log: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a queue has done: runs by how they ended. `elsewhere`: left to another queue, which was running them."""

    done: list[Job]
    failed: list[Failure]
    elsewhere: list[Job]


class RunQueue:
    """Works jobs off in their order, several at once; a base alone, with all cores, before the runs that need it.

    A base starts as soon as its turn has come, nothing is running, and no other process is at a base of its suite.
    Until then the later runs whose own base is finished overtake it, in their order, so that no core is idle. There
    are only so many of them, and no result depends on the order.

    What is finished is not repeated, and a run that was stopped continues. A failed run does not stop the others.
    On Ctrl-C or SIGTERM the running ones are ended, and `KeyboardInterrupt` is raised.

    Args:
        jobs: from `Benchmark.select`.
        command: how to run one.
        workers: runs at once.
        cores_per_run: threads of each. A base is left to use all cores.
        say: is given one line per event.
        poll: seconds between two looks at the running ones.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        command: Command,
        *,
        workers: int,
        cores_per_run: int = 1,
        say: Callable[[str], None] = print,
        poll: float = 0.5,
    ) -> None:
        if workers < 1 or cores_per_run < 1:
            raise ValueError(f"workers and cores_per_run must be at least 1, got {workers} and {cores_per_run}")
        self._jobs, self._command, self._workers, self._cores = list(jobs), command, workers, cores_per_run
        self._say, self._poll = say, poll
        self._running: list[_Child] = []
        self._outcome = Outcome([], [], [])
        self._told: set[str] = set()  # bases of which it was said that another process is running them

    def run(self) -> Outcome:
        """Work everything off."""
        waiting = list(self._jobs)
        with _terminate_as_interrupt():
            try:
                while waiting or self._running:
                    self._start_ready(waiting)
                    self._reap()
                    if waiting or self._running:
                        time.sleep(self._poll)
            finally:
                self._end_children()
        return self._outcome

    def _start_ready(self, waiting: list[Job]) -> None:
        """Start what can start now, and take it off the list."""
        missing: set[str] = set()  # bases that are not there yet; each comes before its runs
        taken: set[Path] = set()  # suites of which another process is running a base
        for job in list(waiting):
            if not self._has_room():
                return
            if job.is_base:
                if not self._start_base(job, taken):
                    missing.add(job.name)
                    continue
            elif job.base is not None and job.base.name in missing:
                continue
            elif not self._start(job):
                self._outcome.elsewhere.append(job)
            waiting.remove(job)

    def _start_base(self, job: Job, taken: set[Path]) -> bool:
        """Start a base, or enter it as done or failed; False if it has to wait."""
        if progress(job).done:
            self._outcome.done.append(job)
            return True
        if self._running or job.folder.parent in taken:
            return False
        if self._start(job):
            return True
        taken.add(job.folder.parent)
        if job.name not in self._told:
            self._told.add(job.name)
            self._say(f"waiting for {job.name}, which another process is running")
        return False

    def _has_room(self) -> bool:
        return len(self._running) < self._workers and not any(child.job.is_base for child in self._running)

    def _start(self, job: Job) -> bool:
        """Start a job, or enter it as done or failed; False if another process is running it."""
        if job.base is not None and not progress(job.base).done:
            self._fail(job, f"its base {job.base.name} is not finished")
            return True
        try:
            lock = claim(job)
        except OSError as error:
            self._fail(job, f"{job.folder} cannot be used: {error.strerror or error}")
            return True
        if lock is None:
            return False
        with lock:
            found = progress(job)
            if found.problem:
                self._fail(job, found.problem)
            elif found.done:
                self._outcome.done.append(job)
            else:
                try:
                    self._spawn(job, lock)
                except (RunError, OSError, ValueError) as error:  # of this run or its base: the others go on
                    self._fail(job, str(error))
                else:
                    self._say(f"{self._place(job)} {'goes on' if found.seconds else 'starts'}: {job.name}")
        return True

    def _spawn(self, job: Job, lock: IO[str]) -> None:
        take_over_base(job)
        recipe = job.folder / "recipe.yaml"
        write_text(recipe, yaml.safe_dump(dict(job.recipe), sort_keys=False, allow_unicode=True))
        environment = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
        if not job.is_base:
            environment |= dict.fromkeys(THREAD_VARIABLES, str(self._cores))
        environment.setdefault("TQDM_MININTERVAL", "30")  # the log keeps every state of a bar
        command = list(self._command(job, recipe))
        started = time.time()
        write_json(job.folder / "queue.json", {"started": started, "exit_code": None})
        with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # The run holds the lock too: if this queue is killed and the run goes on, nobody starts it twice.
                pass_fds=[lock.fileno()],
                start_new_session=True,  # so that it can be ended with its simulation processes
            )
        self._running.append(_Child(job, process, started))

    def _reap(self) -> None:
        for child in list(self._running):
            if not child.exited():
                continue
            self._running.remove(child)
            code = child.end()
            minutes = (time.time() - child.started) / 60
            with suppress(OSError):  # a note for `status`; the run itself says below how it ended
                write_json(child.job.folder / "queue.json", {"started": child.started, "exit_code": code})
            found = progress(child.job)
            if code == 0 and found.done:
                self._outcome.done.append(child.job)
                self._say(f"{self._place(child.job)} finished in {minutes:.1f} min: {child.job.name}")
            else:
                undone = ", ".join(found.pending) or "having measured every stage"
                reason = f"exit code {code}" if code else found.problem or f"ended without {undone}"
                self._fail(child.job, reason, log_tail(child.job.folder / "log.txt"))

    def _fail(self, job: Job, reason: str, log: str = "") -> None:
        self._outcome.failed.append(Failure(job, reason, log))
        self._say(f"{self._place(job)} FAILED ({reason}): {job.name}" + (f"\n{log}" if log else ""))

    def _place(self, job: Job) -> str:
        return f"[{self._jobs.index(job) + 1}/{len(self._jobs)}]"

    def _end_children(self) -> None:
        """End what is running; it continues with the next queue."""
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for child in self._running:
                child.signal(signal.SIGTERM)
            while time.monotonic() < deadline and not all(child.exited() for child in self._running):
                time.sleep(0.05)
        finally:  # also after a second Ctrl-C
            for child in self._running:
                child.end()
            self._running.clear()


@dataclass(frozen=True)
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    started: float

    def exited(self) -> bool:
        """Whether it has ended. It is not reaped here: until then its number, and its group's, is no one else's."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def signal(self, number: int) -> None:
        """To the process and to the simulation processes it has started."""
        with suppress(ProcessLookupError, PermissionError):  # nobody is left
            os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Kill what is left of it and give its exit code."""
        self.signal(signal.SIGKILL)
        return self.process.wait()


def claim(job: Job) -> IO[str] | None:
    """The lock of a run, to be closed by who has it; None if another process is running it.

    Raises:
        OSError: its folder cannot be written to, or has no locks.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    # The bases of a suite record into one folder of demonstrations.
    path = job.folder.parent / ".base.lock" if job.is_base else job.folder / ".queue.lock"
    lock = path.open("a", encoding="utf-8")
    try:
        for _ in range(5):
            if try_lock(lock):
                return lock
            time.sleep(0.1)  # `describe_status` may be trying it just now
    except BaseException:
        lock.close()
        raise
    lock.close()
    return None


def log_tail(path: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a log, of a progress bar its last state."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 20_000, 0))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    kept = [line.rsplit("\r", 1)[-1].rstrip() for line in re.sub(r"\r+\n", "\n", text).split("\n")]
    return "\n".join(f"    {line}" for line in [line for line in kept if line][-lines:])


def describe_status(jobs: Sequence[Job], workers: int, held: Container[RunKey] = ()) -> str:
    """A table of all runs: how far each is and its time, then a summary and, if it can be told, the time to go.

    A run of `held`, which is finished elsewhere, is `held` unless it is done or running here; a base that no other run
    needs then is `unneeded`. The time is that of finished steps. The estimate takes the mean of the finished runs for
    each of the others.
    """
    counts: dict[str, int] = {}
    rows, finished, to_go = [], [], 0.0
    needed = {job.base.name for job in jobs if job.base and not _is_held(job, held)}
    for job in jobs:
        state, found = _state(job.same_as or job)
        if state in _IDLE and _is_held(job, held):
            state, found = "held", replace(found, stages=found.planned, seconds=0.0)
        elif state in _IDLE and job.is_base and held and job.name not in needed:
            state = "unneeded"
        if job.same_as:
            rows.append((job.name, state, f"{found.stages}/{found.planned}", "", f"is {job.same_as.name}"))
            continue
        counts[state] = counts.get(state, 0) + 1
        if job.key and state == "done":
            finished.append(found.seconds)
        elif job.key and state != "held":
            to_go += 1 - found.stages / found.planned
        notes = found.problem or ""
        if state == "running":
            started = _last_start(job).get("started")
            known = isinstance(started, (int, float)) and 0 < started < 1e11
            notes = f"since {time.strftime('%d %b %H:%M', time.localtime(started))}" if known else ""
        elif state == "failed":
            notes = f"exit code {_last_start(job).get('exit_code')}; see {job.folder / 'log.txt'}"
        minutes = f"{found.seconds / 60:.1f} min" if found.seconds else ""
        rows.append((job.name, state, f"{found.stages}/{found.planned}", minutes, notes))
    width = max((len(row[0]) for row in rows), default=0)
    lines = [f"{'run':<{width}}  {'state':<8}  {'stages':>6}  {'time':>10}"]
    lines += [
        f"{name:<{width}}  {state:<8}  {stages:>6}  {minutes:>10}  {notes}".rstrip()
        for name, state, stages, minutes, notes in rows
    ]
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    if finished and to_go:
        hours = sum(finished) / len(finished) * to_go / workers / 3600
        summary += f"; about {hours:.1f} h to go with {workers} at once, bases not counted"
    return "\n".join([*lines, summary])


_IDLE = ("waiting", "stopped", "failed")


def _is_held(job: Job, held: Container[RunKey]) -> bool:
    return any(each and each.key and each.key in held for each in (job, job.same_as))


def _state(job: Job) -> tuple[str, Progress]:
    found = progress(job)
    if found.done:
        return "done", found
    last = _last_start(job)
    if last and last.get("exit_code") is None and _is_running(job):
        return "running", found
    if found.problem:
        return "unusable", found
    if last.get("exit_code"):
        return "failed", found
    return ("stopped" if last else "waiting"), found


def _is_running(job: Job) -> bool:
    try:
        lock = claim(job)
    except OSError:
        return False
    if lock is None:
        return True
    lock.close()
    return False


def _last_start(job: Job) -> dict[str, Any]:
    try:
        content = json.loads((job.folder / "queue.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that the running processes are ended in one place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
