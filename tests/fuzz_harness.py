"""Damaged files, given to a reader in a child process that may neither crash, hang, grow, execute nor write.

The child is forked: what is imported already stays so. It has a limit on its memory and on the CPU time of each file,
and a hook in the interpreter that sees every file that is opened for writing, every process, connection and unpickled
class. A child that dies is replaced, and the file it died of is counted.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_mutations import TRAP, damage

MEMORY = 1 << 30
"""Bytes of address space beyond what the child begins with."""
RESIDENT = 384 << 20
"""Bytes by which one reader's child may have grown at the end."""
CPU_SECONDS = 20
"""CPU time for one file. Each takes some milliseconds; a reader that hangs takes all there is."""
SILENCE = 240
"""Wall-clock seconds without a finished file, after which a child that waits without computing is given up."""
CURES = (
    "again", "restore", "delete", "remove", "update", "copy", "choose", "give ", "write ", "did you mean", "--help",
    "start anew", "must be", "must hold", "must have", "must name", "leave", "use", "say ", "should", "do not",
    "one of", "repeat", "put it back", "see ", "there are", "reinstall", "run ", "expected", "needs", "has tasks",
    "ame the right", "convert it",
)  # fmt: skip
"""A message has at least one of these: what to do, or what is right."""


@dataclass(frozen=True)
class Reader:
    """A reader and a good example of what it reads.

    Attributes:
        name: shown in the table.
        make: writes the example into an empty folder.
        read: reads it from there.
        files: which files are damaged, as patterns; the whole content of the folder is copied for each case.
        errors: what it may raise; the message must name a file of the folder (or the folder) and a cure.
        names_file: False where the input is no file.
        reseal: called after the damage, to give files with checksums the right ones again.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: Sequence[str]
    errors: tuple[type[Exception], ...]
    names_file: bool = True
    reseal: Callable[[Path], None] | None = None


@dataclass
class Outcome:
    """What became of the files that one reader was given."""

    read: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def files(self) -> int:
        return self.read + self.refused + len(self.failures)


class _TooLongError(BaseException):
    pass


class _ForbiddenError(BaseException):
    pass


def fuzz(reader: Reader, cases: int, seed: int) -> Outcome:
    """Give the reader `cases` damaged files; which ones follows from the seed and the reader's name alone."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="infovla-fuzz-") as name:
        folder = Path(name).resolve()
        (folder / "good").mkdir()
        reader.make(folder / "good")
        reader.read(folder / "good")  # the example itself must be right
        begun = 0
        while begun < cases and len(outcome.failures) < 20:
            begun = _child(reader, range(begun, cases), seed, folder, outcome)
    return outcome


def summary(outcomes: dict[str, Outcome]) -> str:
    """The table of the README."""
    lines = ["| reader | files | read | refused | failed |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {o.files} | {o.read} | {o.refused} | {len(o.failures)} |" for name, o in outcomes.items()]
    total = Counter[str]()
    for one in outcomes.values():
        total.update(files=one.files, read=one.read, refused=one.refused, failed=len(one.failures))
    lines.append(f"| all | {total['files']} | {total['read']} | {total['refused']} | {total['failed']} |")
    return "\n".join(lines)


def _child(reader: Reader, cases: range, seed: int, folder: Path, outcome: Outcome) -> int:
    """Work cases off in a child until it ends; the number of the next one."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(reader, cases, seed, folder, sending))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks of processes with threads
        process.start()
    sending.close()
    done = cases.start
    reason = "hangs without computing"
    try:
        while receiving.poll(SILENCE):
            number, kind, text = receiving.recv()
            done = number + 1
            if kind == "read":
                outcome.read += 1
            elif kind == "refused":
                outcome.refused += 1
            else:
                outcome.failures.append(f"{reader.name} #{number}: {text}")
                if kind == "grown":
                    done = cases.stop
    except EOFError:
        process.join()
        if done == cases.stop:
            return done
        reason = f"the process died with exit code {process.exitcode}"
    if process.is_alive():
        process.kill()
    process.join()
    outcome.failures.append(f"{reader.name} #{done}: {reason}")
    return done + 1


def _work(reader: Reader, cases: range, seed: int, folder: Path, results: Any) -> None:
    import torch

    torch.set_num_threads(1)  # the parent's threads do not exist here
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os.environ["INFOVLA_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    with open("/proc/self/statm", encoding="utf-8") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGPROF, _too_long)
    watch = _Watch(folder)
    sys.addaudithook(watch)
    warnings.simplefilter("ignore")
    for number in cases:
        random_ = random.Random(f"{seed}/{reader.name}/{number}")
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(folder / "good", case)
        candidates = sorted(file for pattern in reader.files for file in case.glob(pattern))
        victim = random_.choice(candidates)
        victim.write_bytes(damage(victim.read_bytes(), victim.name, random_))
        if reader.reseal is not None and random_.random() < 0.9:
            reader.reseal(case)
        results.send((number, *_judge(reader, case, watch)))
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown
    if growth << 10 > RESIDENT:
        results.send((cases.stop - 1, "grown", f"grew by {growth >> 10} MiB"))
    results.close()


def _judge(reader: Reader, case: Path, watch: _Watch) -> tuple[str, str]:
    watch.seen, watch.on = [], True
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        reader.read(case)
        verdict = "read", ""
    except reader.errors as error:
        message = str(error)
        names = [file.name for file in (case, *case.rglob("*"))] if reader.names_file else [""]
        if not any(name in message for name in names):
            verdict = "failed", f"does not name its file: {message:.300}"
        elif not any(cure in message for cure in CURES):
            verdict = "failed", f"names no cure: {message:.300}"
        elif len(message) > 4000:
            verdict = "failed", f"a message of {len(message)} characters: {message:.300}"
        else:
            verdict = "refused", ""
    except _TooLongError:
        verdict = "failed", f"took more than {CPU_SECONDS} s of CPU time"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "infovla_peft" in f.filename][-1:]
        verdict = "failed", f"{type(error).__name__} at {where.filename}:{where.lineno} via {ours}: {error!s:.200}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        watch.on = False
    return ("failed", f"forbidden: {watch.seen[0]}") if watch.seen else verdict


def _too_long(*_: object) -> None:
    raise _TooLongError


EXECUTES = frozenset(
    {
        "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile",
        "pickle.find_class", "socket.connect", "socket.getaddrinfo", "webbrowser.open", "pty.spawn",
    }
)  # fmt: skip
CHANGES = frozenset(
    {
        "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
        "shutil.rmtree", "shutil.move", "shutil.copyfile",
    }
)  # fmt: skip
"""Events of the interpreter, see "Audit events table" in Python's documentation."""


class _Watch:
    """An audit hook: notes, and forbids, what a reader must not do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on = str(folder), False
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        paths: Sequence[Any] = ()
        if event == "open" and _writes(arguments):
            paths = arguments[:1]
        elif event in CHANGES:
            paths = [each for each in arguments if isinstance(each, (str, bytes, os.PathLike))]
        elif event in EXECUTES or (event == "import" and str(arguments[0]).startswith(TRAP)):
            self._forbid(f"{event} {json.dumps(arguments, default=repr)[:200]}")
        for path in paths:
            if isinstance(path, int):
                continue
            with suppress(ValueError):
                place = os.path.realpath(os.fsdecode(path))
                if place != os.devnull and not place.startswith(self.folder):
                    self._forbid(f"{event} {place}")

    def _forbid(self, what: str) -> None:
        self.seen.append(what)
        raise _ForbiddenError(what)


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
