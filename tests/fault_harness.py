"""Faults by the hundred, injected into a small stream; what was lost, as a table.

    python tests/fault_harness.py OUTPUT.json [--short | --share 0.2]

`--share` injects that part of each number.

A fault hits a run, and the same command continues it. A run is lost if it then does not equal the uninterrupted one:
adapters, base and anchors bit for bit, the cells, and results.json but for times.

The simulator is replaced by `stream_fakes` (faults of its processes: `test_simulation_workers.py`), and the report by
a page without figures. Runs are forked from this process, which has everything imported and has not computed anything,
so that a run costs about two seconds. Moments are drawn from a fixed seed.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from stream_fakes import STREAM, TRAINING, fake_frames, install_fakes  # noqa: E402

import infovla_peft.data.recording  # noqa: E402
import infovla_peft.measurement  # noqa: E402
import infovla_peft.trainer  # noqa: E402
from infovla_peft.cli import run_command  # noqa: E402
from infovla_peft.config import InfoVLAConfig, StreamConfig  # noqa: E402
from infovla_peft.data.recorded import DemonstrationManifest, RecordingSettings  # noqa: E402
from infovla_peft.files import atomic_folder  # noqa: E402
from infovla_peft.progress import quiet_libraries  # noqa: E402
from infovla_peft.simulation import Task  # noqa: E402
from infovla_peft.stream import Stream  # noqa: E402
from infovla_peft.verify import verify_run  # noqa: E402

SMALL = {**STREAM, "stream": "B1-2N1", "demonstrations": 1, "base_steps": 4, "stage_steps": 5, "tiny_vision_depth": 2}
TRAIN = {**TRAINING, "counterfactual_frames": 6, "lora_dropout": 0.1, "save_steps": 2, "teacher": "auto"}

Fault = Callable[[random.Random, "Run"], None]
"""Set up in the forked child, before the run starts."""


@dataclass
class Row:
    """One line of the table."""

    fault: str
    injected: int = 0
    lost: int = 0
    problems: list[str] = field(default_factory=list)

    def note(self, problem: str | None) -> None:
        self.injected += 1
        if problem is not None:
            self.lost += 1
            self.problems.append(problem)


@dataclass(frozen=True)
class Ended:
    """How a forked run ended: its exit code (negative: the signal), and what it said."""

    code: int
    said: str


class Run:
    """A small stream in a folder of its own.

    Args:
        folder: of the run.
        stream: what differs from `SMALL`.
    """

    def __init__(self, folder: Path, **stream: Any) -> None:
        self.folder, self._stream = folder, {**SMALL, **stream}

    def go(self) -> None:
        config = StreamConfig(**self._stream)
        with Stream(config, InfoVLAConfig(**{**TRAIN, "output_dir": str(self.folder)})) as stream:
            stream.run()

    def start(self, fault: Callable[[], None] = lambda: None) -> tuple[int, Path]:
        """Fork a process that injects a fault into itself and runs; its number, and the file with what it says."""
        log = self.folder.with_suffix(f".{time.monotonic_ns()}.log")
        child = os.fork()
        if child:
            return child, log
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            torch.set_num_threads(1)
            fault()
            code = run_command(self.go)
        except BaseException as error:
            os.write(2, repr(error).encode())
            code = 99
        os._exit(code)

    def finish(self, fault: Callable[[], None] = lambda: None) -> Ended:
        return wait(*self.start(fault))

    def content(self) -> dict[str, Any]:
        """What must be equal: bytes of tensors, and numbers without times."""
        content: dict[str, Any] = {}
        for file in sorted(self.folder.rglob("*.safetensors")):
            with safe_open(file, framework="np") as tensors:  # whose notes are in no order
                content[str(file.relative_to(self.folder))] = (
                    tensors.metadata(),
                    {
                        name: tensors.get_tensor(name).tobytes()
                        for name in tensors.keys()  # noqa: SIM118
                    },
                )
        for file in sorted(self.folder.glob("stages/*/rollouts/*.json")):
            cell = json.loads(file.read_text())
            content[str(file.relative_to(self.folder))] = {
                key: value for key, value in cell.items() if key not in ("seconds", "sha256")
            }
        results = json.loads((self.folder / "results.json").read_text())
        results["config"].pop("output_dir", None)
        content["results.json"] = {key: value for key, value in results.items() if key != "timings"}
        return content


def wait(child: int, log: Path) -> Ended:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    return Ended(code, text)


class Harness:
    """Runs faults and keeps the table.

    Args:
        folder: for the runs.
        short: a few of each only.
        share: of the full numbers.
    """

    def __init__(self, folder: Path, *, short: bool, share: float = 1.0) -> None:
        self.folder, self.short, self._share = folder, short, share
        self.random = random.Random(0)
        self.rows: list[Row] = []
        self._number = 0
        self.reference = Run(folder / "reference", **self._stream)
        start = time.monotonic()
        self.writes = self._count_writes()
        self.seconds = time.monotonic() - start
        self.expected = self.reference.content()

    @property
    def _stream(self) -> dict[str, Any]:
        return {"stream": "B1-1N1"} if self.short else {}

    def times(self, full: int, short: int = 1) -> int:
        return short if self.short else max(short, round(self._share * full))

    def row(self, fault: str) -> Row:
        if self.rows:
            print(asdict(self.rows[-1]), file=sys.stderr, flush=True)
        self.rows.append(Row(fault))
        return self.rows[-1]

    @contextmanager
    def run(self) -> Iterator[Run]:
        self._number += 1
        run = Run(self.folder / f"run_{self._number}", **self._stream)
        yield run
        shutil.rmtree(run.folder, ignore_errors=True)

    def problem(self, run: Run, ended: Ended) -> str | None:
        """What distinguishes a run that was continued to its end from the uninterrupted one."""
        if ended.code:
            return f"exit code {ended.code}: {ended.said[-300:]}"
        found = verify_run(run.folder)
        if not found.ok:
            return found.describe()
        content = run.content()
        differing = [key for key in {**self.expected, **content} if content.get(key) != self.expected.get(key)]
        return f"differs: {differing}" if differing else None

    def _count_writes(self) -> int:
        """How often an uninterrupted run calls `fsync`, which each of its writes does."""
        counted = self.folder / "writes"

        def count() -> None:
            fsync, calls = os.fsync, [0]

            def counting(descriptor: int) -> None:
                calls[0] += 1
                fsync(descriptor)
                counted.write_text(str(calls[0]))

            os.fsync = counting

        ended = self.reference.finish(count)
        assert ended.code == 0, ended.said
        return int(counted.read_text())

    # --- faults ------------------------------------------------------------------------------------------------------

    def kill_anywhere(self) -> None:
        row = self.row("SIGKILL at a random moment")
        while row.injected < self.times(80):
            with self.run() as run:
                kills = 0
                for _ in range(2 if self.short else 4):
                    child, log = run.start()
                    time.sleep(self.random.uniform(0, self.seconds))
                    os.kill(child, signal.SIGKILL)
                    kills += wait(child, log).code == -signal.SIGKILL
                    if run.folder.exists() and (run.folder / "config.yaml").exists():
                        damage = verify_run(run.folder)
                        if not damage.ok:
                            row.note(f"after a kill: {damage.describe()}")
                self._close(row, run, kills)

    def kill_within_a_write(self) -> None:
        row = self.row("SIGKILL within a write")
        while row.injected < self.times(40):
            with self.run() as run:
                kills = 0
                for _ in range(1 if self.short else 2):
                    after = self.random.randrange(self.writes)
                    kills += run.finish(lambda after=after: _at_fsync(after, _die)).code == -signal.SIGKILL
                self._close(row, run, kills)

    def _close(self, row: Row, run: Run, kills: int) -> None:
        problem = self.problem(run, run.finish())
        for number in range(kills):
            row.note(problem if number == 0 else None)

    def stop(self, number: signal.Signals, name: str, code: int) -> None:
        row = self.row(name)
        while row.injected < self.times(8):
            with self.run() as run:
                step = self.random.randrange(1, 4)
                ended = run.finish(lambda step=step: _at_step(step, lambda: os.kill(os.getpid(), number)))
                problem = None
                if ended.code != code or "the same command continues" not in ended.said:
                    problem = f"exit code {ended.code}: {ended.said[-300:]}"
                elif f"checkpoint-{step}" not in ended.said:
                    problem = f"no checkpoint of step {step}: {ended.said[-300:]}"
                row.note(problem or self.problem(run, run.finish()))

    def refuse(self, name: str, number: int, text: str) -> None:
        row = self.row(name)
        while row.injected < self.times(12):
            with self.run() as run:
                after = self.random.randrange(self.writes)

                def fail() -> None:
                    raise OSError(number, os.strerror(number))

                ended = run.finish(lambda after=after, fail=fail: _at_fsync(after, fail))
                problem = None if ended.code == 1 and text in ended.said else f"{ended.code}: {ended.said[-300:]}"
                row.note(problem or self.problem(run, run.finish()))

    def cut_off(self) -> None:
        row = self.row("a write refused in the middle of a file (RLIMIT_FSIZE)")
        while row.injected < self.times(12):
            with self.run() as run:
                limit = self.random.choice([512, 2048, 8192, 20_000])
                ended = run.finish(lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
                problem = None if ended.code == 1 else f"{ended.code}: {ended.said[-300:]}"
                row.note(problem or self.problem(run, run.finish()))

    def diverge(self, name: str, break_loss: Callable[[torch.Tensor], torch.Tensor], text: str) -> None:
        row = self.row(name)
        while row.injected < self.times(6):
            with self.run() as run:
                step = self.random.randrange(2, 5)

                def inject(step: int = step) -> None:
                    compute = infovla_peft.trainer.InfoVLATrainer.compute_loss

                    def broken(trainer: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
                        loss = compute(trainer, model, inputs, *rest, **options)
                        return _broken(trainer, loss, break_loss) if trainer.state.global_step + 1 == step else loss

                    infovla_peft.trainer.InfoVLATrainer.compute_loss = broken

                ended = run.finish(inject)
                problem = None
                if ended.code != 1 or text not in ended.said or "demonstration 0: frames" not in ended.said:
                    problem = f"{ended.code}: {ended.said[-500:]}"
                row.note(problem or self.problem(run, run.finish()))

    def jump(self) -> None:
        row = self.row("clock set forward or back by years, at every look")
        while row.injected < self.times(6):
            with self.run() as run:
                seed = self.random.randrange(1000)

                def inject(seed: int = seed) -> None:
                    draw, now = random.Random(seed), time.time
                    time.time = lambda: now() + draw.uniform(-1e8, 1e8)
                    _at_step(3, _die)

                ended = run.finish(inject)
                problem = None if ended.code == -signal.SIGKILL else f"{ended.code}: {ended.said[-300:]}"
                row.note(problem or self.problem(run, run.finish(lambda seed=seed: inject_clock(seed))))

    def share(self) -> None:
        row = self.row("a second run on the same folder")
        while row.injected < self.times(6):
            with self.run() as run:
                child, log = run.start()
                while not (run.folder / "config.yaml").exists():
                    time.sleep(0.01)
                second = run.finish()
                first = wait(child, log)
                named = second.code == 1 and f"process {child} on" in second.said
                row.note((None if named else f"{second.code}: {second.said[-300:]}") or self.problem(run, first))

    def damage(self) -> None:
        kinds = ("one bit flipped", "cut off", "second half zero", "exchanged for another file")
        rows = {kind: self.row(f"file on disk: {kind} (found and named by `infovla verify`)") for kind in kinds}
        files = [file for file in self.reference.folder.rglob("*") if file.is_file() and _is_checked(file)]
        for kind, row in rows.items():
            while row.injected < self.times(25, 3):
                file, other = self.random.sample(files, 2)
                whole = file.read_bytes()
                content = bytearray(whole)
                if kind == "one bit flipped":
                    place = self.random.randrange(8 * len(whole))
                    content[place // 8] ^= 1 << place % 8
                elif kind == "cut off":
                    content = content[: self.random.randrange(len(whole) - 2)]
                elif kind == "second half zero":
                    content[len(whole) // 2 :] = bytes(len(whole) - len(whole) // 2)
                else:
                    content = bytearray(other.read_bytes())
                file.write_bytes(bytes(content))
                found = verify_run(self.reference.folder)
                file.write_bytes(whole)
                if bytes(content) != whole and not _same_json(bytes(content), whole):
                    row.note(None if file in found.damage else f"{file} not named: {found.describe()}")
        assert verify_run(self.reference.folder).ok

    def everything(self) -> None:
        """All faults; in short those that are not the same code under another name."""
        self.kill_anywhere()
        self.kill_within_a_write()
        self.stop(signal.SIGTERM, "SIGTERM in training", 143)
        self.refuse("ENOSPC at a write", errno.ENOSPC, "the disk is full")
        self.diverge("loss NaN", lambda loss: loss * float("nan"), "the loss is nan")
        self.share()
        self.damage()
        if self.short:
            return
        self.stop(signal.SIGINT, "Ctrl-C in training", 130)
        self.refuse("EIO at a write", errno.EIO, "the disk fails")
        self.refuse("read-only file system at a write", errno.EROFS, "no permission to write")
        self.cut_off()
        self.diverge("gradient exploded", lambda loss: loss * 1e12, "above grad_norm_limit")
        self.jump()

    def table(self) -> str:
        lines = ["| fault | injected | lost |", "|---|---|---|"]
        lines += [f"| {row.fault} | {row.injected} | {row.lost} |" for row in self.rows]
        total = f"| together | {sum(row.injected for row in self.rows)} | {sum(row.lost for row in self.rows)} |"
        return "\n".join([*lines, total])


# --- what a child does to itself ---------------------------------------------------------------------------------


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_fsync(after: int, act: Callable[[], None]) -> None:
    """Act in the place of one `fsync`, when so many have passed: the file is written and not renamed yet."""
    fsync, left = os.fsync, [after]

    def counting(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == -1:
            act()
        fsync(descriptor)

    os.fsync = counting


def _at_step(step: int, act: Callable[[], None]) -> None:
    """Act within a training step of the second training."""
    trained, compute = [], infovla_peft.trainer.InfoVLATrainer.compute_loss

    def acting(trainer: Any, *rest: Any, **options: Any) -> Any:
        if id(trainer) not in trained:
            trained.append(id(trainer))
        if len(trained) == 2 and trainer.state.global_step + 1 == step:
            act()
        return compute(trainer, *rest, **options)

    infovla_peft.trainer.InfoVLATrainer.compute_loss = acting


def inject_clock(seed: int) -> None:
    draw, now = random.Random(seed), time.time
    time.time = lambda: now() + draw.uniform(-1e8, 1e8)


def _broken(trainer: Any, loss: Any, break_loss: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    loss = (break_loss(loss[0]), *loss[1:]) if isinstance(loss, tuple) else break_loss(loss)
    trainer._loss = (loss[0] if isinstance(loss, tuple) else loss).detach()
    return loss


def _is_checked(file: Path) -> bool:
    """Files that carry numbers; what is drawn from them (report/) and logs are not."""
    relative = str(file)
    return not any(part in relative for part in ("/report/", "log.jsonl", ".lock", "/demonstrations/"))


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def _record(tasks: Sequence[Task], folder: Path, *, episodes: int, **_options: Any) -> None:
    with atomic_folder(folder) as temporary:
        fake_frames(tasks, episodes).save_to_disk(str(temporary))
        settings = RecordingSettings("primitive", "3.3.2", 24, ("agentview",), "fast", 0.1, 0)
        DemonstrationManifest(settings).save(temporary)


def _page(folder: Path) -> None:
    with atomic_folder(folder / "report") as report:
        (report / "index.html").write_text("a page")


def main(options: argparse.Namespace) -> int:
    quiet_libraries(loading_bars=False)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    patch = pytest.MonkeyPatch()
    install_fakes(patch, folder)
    patch.setattr(infovla_peft.measurement, "write_report", _page)
    patch.setattr(infovla_peft.data.recording, "record_demonstrations", _record)
    gc.freeze()  # else each child's collections walk through everything that is imported here
    start = time.monotonic()
    try:
        harness = Harness(folder, short=options.short, share=options.share)
        harness.everything()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Path(options.output).write_text(json.dumps([asdict(row) for row in harness.rows], indent=2))
    print(harness.table())
    print(f"{time.monotonic() - start:.0f} s; an uninterrupted run: {harness.seconds:.1f} s")
    return int(any(row.lost for row in harness.rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Inject faults into a small stream.")
    parser.add_argument("output", help="JSON of the table")
    parser.add_argument("--short", action="store_true", help="a few faults only")
    parser.add_argument("--share", type=float, default=1.0, help="part of the full numbers")
    sys.exit(main(parser.parse_args()))
