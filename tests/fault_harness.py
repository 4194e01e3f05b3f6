"""Faults by the hundred, injected into a small stream; what was lost, as a table.

    python tests/fault_harness.py TABLE.json [--short | --share 0.2] [--lanes 2]

A fault hits a run, and the same command continues it. A run is lost if it then does not equal the uninterrupted one:
adapters, base and anchors bit for bit, the cells, and results.json but for times. What is drawn follows from the name
of the fault and the number of the case alone.

Cases are shared by two processes. A fault in a late step begins with a copy of the uninterrupted run's folder as it
was after the step before. Files lie in /dev/shm where there is room: what a killed process has written stays, there as
on a disk. The table is written as it grows; a stopped harness goes on where it was (TABLE.json.cases, removed at the
end).
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from fault_runs import (  # noqa: E402
    Ended,
    Run,
    at_fsync,
    at_step,
    break_loss,
    die,
    jump_clock,
    keep_states,
    prepare,
)

from infovla_peft.verify import verify_run  # noqa: E402

DAMAGE = ("one bit flipped", "cut off", "second half zero", "exchanged for another file")
ROOM = 1 << 30

Problems = list[str | None]
"""One for each fault that a case injected: what was lost by it, or None."""
Case = Callable[[random.Random], Problems]


@dataclass
class Row:
    """One line of the table."""

    fault: str
    planned: int = 0
    injected: int = 0
    lost: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fault:
    """A kind of fault: how many cases there are in the full harness and in the short one, and how one is done."""

    name: str
    cases: int
    short: int
    each: int
    do: Case


class Faults:
    """What can happen to a run, each as a case.

    Args:
        folder: for the runs.
        short: a smaller stream, fewer kills for each run.
    """

    def __init__(self, folder: Path, *, short: bool) -> None:
        self.folder, self.short = folder, short
        self._stream = {"stream": "B1-1N1"} if short else {}
        self._number = 0
        reference, states = Run(folder / "reference", **self._stream), folder / "states"
        ended = reference.finish(partial(keep_states, reference.folder, states))
        assert ended.code == 0, str(ended)
        self.cpu, self.expected, self._reference = ended.cpu, reference.content(), reference.folder
        self._states = [(int(path.name.split("_")[0]), path) for path in sorted(states.iterdir())]
        self.writes = self._states[-1][0]  # `fsync` is called by each

    @contextmanager
    def run(self, *, before_write: int | None = None, before_step: str | None = None) -> Iterator[tuple[Run, int]]:
        """A new run, and how many writes it has behind it: none, or those of the uninterrupted one's state before."""
        self._number += 1
        run, passed = Run(self.folder / f"run_{os.getpid()}_{self._number}", **self._stream), 0
        for count, path in reversed(self._states):
            if (before_write is not None and count <= before_write) or path.name.endswith(f"_{before_step}"):
                shutil.copytree(path, run.folder)
                passed = count
                break
        yield run, passed
        shutil.rmtree(run.folder, ignore_errors=True)

    def problem(self, run: Run, ended: Ended | None = None) -> str | None:
        """What distinguishes a run that was continued to its end from the uninterrupted one."""
        ended = ended or run.finish()
        if ended.code:
            return str(ended)
        found = verify_run(run.folder)
        if not found.ok:
            return found.describe()
        content = run.content()
        differing = [key for key in {**self.expected, **content} if content.get(key) != self.expected.get(key)]
        return f"differs: {differing}" if differing else None

    def kill_anywhere(self, random_: random.Random) -> Problems:
        with self.run() as (run, _):
            kills, left = 0, self.cpu
            found: Problems = []
            while kills < (2 if self.short else 4):
                moment = random_.uniform(0, left)
                ended = run.start().kill_at(moment)
                if ended.code != -signal.SIGKILL:  # it was faster: its end is worth a look, then another run begins
                    if (problem := self.problem(run, ended)) is not None:
                        return [problem]
                    shutil.rmtree(run.folder)
                    left = self.cpu
                    continue
                kills, left = kills + 1, max(left - moment, 0.1 * self.cpu)
                damage = verify_run(run.folder) if (run.folder / "config.yaml").exists() else None
                found.append(None if damage is None or damage.ok else f"after a kill: {damage.describe()}")
            found[-1] = found[-1] or self.problem(run)
            return found

    def kill_within_a_write(self, random_: random.Random) -> Problems:
        first = random_.randrange(self.writes)
        with self.run(before_write=first if random_.random() < 0.5 else None) as (run, passed):
            found: Problems = []
            for after in (first - passed, random_.randrange(self.writes - first))[: 1 if self.short else 2]:
                ended = run.finish(partial(at_fsync, after, die))
                found.append(None if ended.code == -signal.SIGKILL else str(ended))
            found[-1] = found[-1] or self.problem(run)
            return found

    def stop(self, number: signal.Signals, code: int, random_: random.Random) -> Problems:
        step = random_.randrange(1, 4)
        with self.run(before_step="measure_00") as (run, _):
            ended = run.finish(lambda: at_step(step, lambda: os.kill(os.getpid(), number)))
            said = all(text in ended.said for text in ("the same command continues", f"checkpoint-{step}"))
            return [self.problem(run) if ended.code == code and said else str(ended)]

    def refuse(self, number: int, text: str, random_: random.Random) -> Problems:
        after = random_.randrange(self.writes)

        def fail() -> None:
            raise OSError(number, os.strerror(number))

        with self.run(before_write=after) as (run, passed):
            ended = run.finish(partial(at_fsync, after - passed, fail))
            return [self.problem(run) if ended.code == 1 and text in ended.said else str(ended)]

    def cut_off(self, random_: random.Random) -> Problems:
        limit = random_.choice([512, 2048, 8192, 20_000])
        with self.run() as (run, _):
            ended = run.finish(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            return [self.problem(run) if ended.code == 1 else str(ended)]

    def diverge(self, change: Callable[[torch.Tensor], torch.Tensor], text: str, random_: random.Random) -> Problems:
        stage, step = random_.randrange(2), random_.randrange(2, 5)
        with self.run(before_step="measure_00" if stage else "demonstrations") as (run, _):
            ended = run.finish(partial(break_loss, stage, step, change))
            named = text in ended.said and "demonstration 0: frames" in ended.said
            return [self.problem(run) if ended.code == 1 and named else str(ended)]

    def jump(self, random_: random.Random) -> Problems:
        seed = random_.randrange(1000)

        def inject() -> None:
            jump_clock(seed)
            at_step(3, die)

        with self.run() as (run, _):
            ended = run.finish(inject)
            continued = ended.code == -signal.SIGKILL
            return [self.problem(run, run.finish(partial(jump_clock, seed))) if continued else str(ended)]

    def share(self, random_: random.Random) -> Problems:
        with self.run(before_write=random_.randrange(self.writes)) as (run, _):
            first = run.start()
            deadline = time.monotonic() + 60
            while not (run.folder / ".lock").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            second = run.finish()
            ended = first.wait()
            named = second.code == 1 and f"process {first.process} on" in second.said
            return [self.problem(run, ended) if named else str(second)]

    def damage(self, kind: str, random_: random.Random) -> Problems:
        with self.run(before_write=self.writes) as (run, _):
            files = [file for file in sorted(run.folder.rglob("*")) if file.is_file() and _is_checked(file)]
            while True:
                file, other = random_.sample(files, 2)
                whole, content = file.read_bytes(), _damaged(file.read_bytes(), other.read_bytes(), kind, random_)
                if content != whole and not _same_json(content, whole):
                    break
            file.write_bytes(content)
            found = verify_run(run.folder)
            file.write_bytes(whole)
            assert verify_run(run.folder).ok
            return [None if file in found.damage else f"{file} not named: {found.describe()}"]

    def all(self) -> list[Fault]:
        """Every kind; none in the short harness of those that are the same code under another name."""
        kills, within = (2, 1) if self.short else (4, 2)
        return [
            Fault("SIGKILL at a random moment", 20, 1, kills, self.kill_anywhere),
            Fault("SIGKILL within a write", 20, 1, within, self.kill_within_a_write),
            Fault("SIGTERM in training", 8, 1, 1, partial(self.stop, signal.SIGTERM, 143)),
            Fault("Ctrl-C in training", 8, 0, 1, partial(self.stop, signal.SIGINT, 130)),
            Fault("ENOSPC at a write", 12, 1, 1, partial(self.refuse, errno.ENOSPC, "the disk is full")),
            Fault("EIO at a write", 12, 0, 1, partial(self.refuse, errno.EIO, "the disk fails")),
            Fault("read-only file system at a write", 12, 0, 1,
                  partial(self.refuse, errno.EROFS, "no permission to write")),
            Fault("a write refused in the middle of a file (RLIMIT_FSIZE)", 12, 0, 1, self.cut_off),
            Fault("loss NaN", 6, 1, 1, partial(self.diverge, lambda loss: loss * float("nan"), "the loss is nan")),
            Fault("gradient exploded", 6, 0, 1,
                  partial(self.diverge, lambda loss: loss * 1e12, "above grad_norm_limit")),
            Fault("clock set forward or back by years, at every look", 6, 0, 1, self.jump),
            Fault("a second run on the same folder", 6, 1, 1, self.share),
            *(
                Fault(f"file on disk: {kind} (found and named by `infovla verify`)", 25, 3, 1,
                      partial(self.damage, kind))
                for kind in DAMAGE
            ),
        ]  # fmt: skip


def _damaged(whole: bytes, other: bytes, kind: str, random_: random.Random) -> bytes:
    content = bytearray(whole)
    if kind == DAMAGE[0]:
        place = random_.randrange(8 * len(whole))
        content[place // 8] ^= 1 << place % 8
    elif kind == DAMAGE[1]:
        content = content[: random_.randrange(len(whole) - 2)]
    elif kind == DAMAGE[2]:
        content[len(whole) // 2 :] = bytes(len(whole) - len(whole) // 2)
    else:
        content = bytearray(other)
    return bytes(content)


def _is_checked(file: Path) -> bool:
    """Files that carry numbers; what is drawn from them (report/) and logs are not."""
    return not any(part in str(file) for part in ("/report/", "log.jsonl", ".lock", "/demonstrations/"))


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


class Table:
    """The cases that are done, line by line on the disk, and what they come to.

    Args:
        file: JSON of the rows.
        planned: fault → number of injections and of cases.
    """

    def __init__(self, file: Path, faults: Sequence[Fault], counts: Sequence[int]) -> None:
        self._file, self.cases = file, file.with_name(f"{file.name}.cases")
        self._planned = {fault.name: fault.each * count for fault, count in zip(faults, counts, strict=True) if count}

    def done(self) -> dict[tuple[str, int], Problems]:
        lines = self.cases.read_text().splitlines() if self.cases.exists() else []
        return {(name, number): problems for name, number, problems in map(json.loads, filter(_whole, lines))}

    def enter(self, fault: Fault, number: int, problems: Problems) -> None:
        with self.cases.open("a") as file:  # one write, at the end of the file whoever else writes
            file.write(json.dumps([fault.name, number, problems]) + "\n")

    def write(self) -> list[Row]:
        rows = {name: Row(name, planned) for name, planned in self._planned.items()}
        for (name, _), problems in self.done().items():
            if row := rows.get(name):
                row.problems += [problem for problem in problems if problem is not None]
                row.injected, row.lost = row.injected + len(problems), len(row.problems)
        self._file.write_text(json.dumps([asdict(row) for row in rows.values()], indent=2))
        return list(rows.values())


def _whole(line: str) -> bool:
    return line.endswith("]")  # not the last one of a harness that was killed


def describe(rows: Sequence[Row]) -> str:
    lines = ["| fault | injected | lost |", "|---|---|---|"]
    lines += [f"| {row.fault} | {row.injected} | {row.lost} |" for row in rows]
    return "\n".join([*lines, f"| together | {sum(r.injected for r in rows)} | {sum(r.lost for r in rows)} |"])


def work(lane: int, todo: Sequence[tuple[Fault, int]], taken: Any, table: Table) -> int:
    """Work off cases, each taken by one lane; gives a process's exit code."""
    try:
        while True:
            with taken.get_lock():
                place, taken.value = taken.value, taken.value + 1
            if place >= len(todo):
                return 0
            fault, number = todo[place]
            begun = time.monotonic()
            problems = fault.do(random.Random(f"{fault.name} {number}"))
            table.enter(fault, number, problems)
            seconds = time.monotonic() - begun
            print(f"lane {lane}: {fault.name} {number}: {seconds:.1f} s", *filter(None, problems), file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        return 1


def main(options: argparse.Namespace) -> int:
    free = shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir="/dev/shm" if free > ROOM else None))
    begun = time.monotonic()
    try:
        prepare(folder)
        gc.freeze()  # else each child's collections walk through everything that is imported here
        faults = Faults(folder, short=options.short)
        known = faults.all()
        counts = [each.short if options.short else max(1, round(options.share * each.cases)) for each in known]
        counts = [count if options.only in each.name else 0 for each, count in zip(known, counts, strict=True)]
        table = Table(Path(options.output), known, counts)
        cases = [(fault, number) for fault, count in zip(known, counts, strict=True) for number in range(count)]
        todo = [(fault, number) for fault, number in cases if (fault.name, number) not in table.done()]
        taken, children = multiprocessing.get_context("fork").Value("i", 0), []
        for lane in range(options.lanes or (1 if options.short else 2)):
            child = os.fork()
            if not child:
                os._exit(work(lane, todo, taken, table))
            children.append(child)
        codes: list[int] = []
        while len(codes) < len(children):
            time.sleep(0.1 if options.short else 1)
            table.write()
            while len(codes) < len(children) and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                codes.append(os.waitstatus_to_exitcode(ended[1]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = table.write()
    print(describe(rows))
    print(f"{time.monotonic() - begun:.0f} s; an uninterrupted run: {faults.cpu:.1f} s of CPU time")
    whole = not any(codes) and all(row.injected >= row.planned for row in rows)
    if whole:
        table.cases.unlink(missing_ok=True)
    return int(not whole or any(row.lost for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Inject faults into a small stream.")
    parser.add_argument("output", help="JSON of the table")
    parser.add_argument("--short", action="store_true", help="a few faults only, in a smaller stream")
    parser.add_argument("--share", type=float, default=1.0, help="part of the full numbers")
    parser.add_argument("--only", default="", metavar="TEXT", help="the faults whose name has this in it")
    parser.add_argument("--lanes", type=int, default=0, help="cases at once; two if not given (short: one)")
    sys.exit(main(parser.parse_args()))
