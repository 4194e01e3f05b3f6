"""Small runs into which faults are injected, and what injects them: in a forked child, before the run starts.

The simulator is replaced by `stream_fakes` (faults of its processes: `test_simulation_workers.py`), and the report by
a page without figures. Runs are forked from a process that has everything imported and has computed nothing, so that a
run costs about two seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from infovla_peft.cli import run_command  # noqa: E402
from infovla_peft.config import InfoVLAConfig, StreamConfig  # noqa: E402
from infovla_peft.data.recorded import DemonstrationManifest, RecordingSettings  # noqa: E402
from infovla_peft.files import atomic_folder  # noqa: E402
from infovla_peft.progress import quiet_libraries  # noqa: E402
from infovla_peft.run_folder import RunFolder  # noqa: E402
from infovla_peft.simulation import Task  # noqa: E402
from infovla_peft.stream import Stream  # noqa: E402
from infovla_peft.trainer import InfoVLATrainer  # noqa: E402

SMALL = {**STREAM, "stream": "B1-2N1", "demonstrations": 1, "base_steps": 4, "stage_steps": 5, "tiny_vision_depth": 2}
TRAIN = {**TRAINING, "counterfactual_frames": 6, "lora_dropout": 0.1, "save_steps": 2, "teacher": "auto"}
PATIENCE = 300.0
"""Seconds after which a run that has not ended counts as hung."""

Injection = Callable[[], None]
"""Called in the child, before the run starts."""


def nothing() -> None:
    """No fault."""


@dataclass(frozen=True)
class Ended:
    """How a forked run ended: its exit code (negative: the signal), what it said, and its CPU time in seconds."""

    code: int
    said: str
    cpu: float

    def __str__(self) -> str:
        return f"exit code {self.code}: {self.said[-400:]}"


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

    def start(self, inject: Injection = nothing) -> Child:
        """Fork a process that injects a fault into itself and runs."""
        log = self.folder.with_suffix(f".{time.monotonic_ns()}.log")
        child = os.fork()
        if child:
            return Child(child, log)
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            torch.set_num_threads(1)
            inject()
            code = run_command(self.go)
        except BaseException as error:
            os.write(2, repr(error).encode())
            code = 99
        os._exit(code)

    def finish(self, inject: Injection = nothing) -> Ended:
        return self.start(inject).wait()

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


class Child:
    """A forked run."""

    def __init__(self, process: int, log: Path) -> None:
        self.process, self._log = process, log

    def kill_at(self, cpu: float) -> Ended:
        """SIGKILL when it has computed for so many seconds, however busy the machine is, or its end before that."""
        clock, deadline = (~self.process << 3) | 2, time.monotonic() + PATIENCE  # clock_getcpuclockid(3)
        while time.monotonic() < deadline and time.clock_gettime(clock) < cpu:
            if os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        os.kill(self.process, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Ended:
        deadline = time.monotonic() + PATIENCE
        while not os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > deadline:
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.002)
        _, status, usage = os.wait4(self.process, 0)
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        self._log.unlink(missing_ok=True)
        hung = f"\nhung for {PATIENCE:.0f} s" if time.monotonic() > deadline else ""
        return Ended(os.waitstatus_to_exitcode(status), text + hung, usage.ru_utime + usage.ru_stime)


def prepare(folder: Path) -> None:
    """Replace what is not under test in this process, before anything is forked."""
    quiet_libraries(loading_bars=False)
    patch = pytest.MonkeyPatch()
    install_fakes(patch, folder)
    patch.setattr(infovla_peft.measurement, "write_report_apart", _page)
    patch.setattr(infovla_peft.data.recording, "record_demonstrations", _record)


def _record(tasks: Sequence[Task], folder: Path, *, episodes: int, **_options: Any) -> None:
    with atomic_folder(folder) as temporary:
        fake_frames(tasks, episodes).save_to_disk(str(temporary))
        settings = RecordingSettings("primitive", "3.3.2", 24, ("agentview",), "fast", 0.1, 0)
        DemonstrationManifest(settings).save(temporary)


def _page(folder: Path) -> None:
    with atomic_folder(folder / "report") as report:
        (report / "index.html").write_text("a page")


# --- what a child does to itself -------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_fsync(after: int, act: Injection) -> None:
    """Act in the place of one `fsync`, when so many have passed: the file is written and not renamed yet."""
    fsync, left = os.fsync, [after]

    def counting(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == -1:
            act()
        fsync(descriptor)

    os.fsync = counting


def at_step(step: int, act: Injection) -> None:
    """Act within a training step of the first stage."""
    compute = InfoVLATrainer.compute_loss

    def acting(trainer: Any, *rest: Any, **options: Any) -> Any:
        if Path(trainer.args.output_dir).name == "stage_01" and trainer.state.global_step + 1 == step:
            act()
        return compute(trainer, *rest, **options)

    InfoVLATrainer.compute_loss = acting


def break_loss(stage: int, step: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Another loss in one step of a stage's training."""
    compute = InfoVLATrainer.compute_loss

    def broken(trainer: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        loss = compute(trainer, model, inputs, *rest, **options)
        if Path(trainer.args.output_dir).name != f"stage_{stage:02d}" or trainer.state.global_step + 1 != step:
            return loss
        loss = (change(loss[0]), *loss[1:]) if isinstance(loss, tuple) else change(loss)
        trainer._loss = (loss[0] if isinstance(loss, tuple) else loss).detach()
        return loss

    InfoVLATrainer.compute_loss = broken


def jump_clock(seed: int) -> None:
    """The clock tells another time at every look, years before or after."""
    draw, now = random.Random(seed), time.time
    time.time = lambda: now() + draw.uniform(-1e8, 1e8)


def keep_states(run: Path, folder: Path) -> None:
    """Copy the run's folder after each of its steps, and note how often `fsync` was called until then."""
    fsync, mark, calls = os.fsync, RunFolder.mark, [0]
    folder.mkdir()

    def counting(descriptor: int) -> None:
        calls[0] += 1
        fsync(descriptor)

    def marking(self: RunFolder, step: str, *rest: Any, **options: Any) -> None:
        mark(self, step, *rest, **options)
        shutil.copytree(run, folder / f"{calls[0]:06d}_{step}", ignore=shutil.ignore_patterns(".lock"))

    os.fsync, RunFolder.mark = counting, marking  # type: ignore[method-assign]
