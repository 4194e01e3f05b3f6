"""A stream of many small stages in one process: what it holds, and what it takes, stay as they are."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_fakes import STREAM, TRAINING, install_fakes
from torch import nn

from infovla_peft.config import InfoVLAConfig, StreamConfig
from infovla_peft.plan import Stage
from infovla_peft.simulation import Task, find_task
from infovla_peft.stream import Stream

pytestmark = pytest.mark.libero
STAGES, SETTLED, WINDOW = 50, 5, 10  # the windows so wide that a busy machine does not decide
CHECKPOINTS = 3
LINE_PER_TASK = 400  # bytes
COMMAND = "import sys; sys.path.insert(0, sys.argv[1]); import test_long_stream; test_long_stream.main(sys.argv[2])"


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def yardstick() -> Callable[[], float]:
    """CPU seconds of a piece of work that is always the same, of a step's kind: what a busy machine slows down too."""
    network = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.GELU())))
    inputs = torch.ones(256, 64)

    def measure() -> float:
        start = time.process_time()
        for _ in range(4):
            network(inputs).sum().backward()
        return time.process_time() - start

    return measure


def processes() -> int:
    """This one, and those that it has started and that are still there."""
    return 1 + sum(len(file.read_text().split()) for file in Path("/proc/self/task").glob("*/children"))


def long_stages(count: int) -> list[Stage]:
    """A base and many stages: more tasks than LIBERO has, so the ten of a suite come again under other names."""
    tasks: list[Task] = [find_task("libero_goal", index) for index in range(10)]
    return [Stage(0, (tasks[0],))] + [
        Stage(number, (replace(tasks[number % 10], name=f"{tasks[number % 10].name}_{number}"),))
        for number in range(1, count + 1)
    ]


def watch(folder: Path, stages: int) -> list[dict[str, float]]:
    """Learn, remember, measure and report all stages, and note after each what the process holds."""
    from infovla_peft.trainer import InfoVLATrainer

    config = StreamConfig(**{**STREAM, "demonstrations": 1, "stage_steps": 8, "base_steps": 2})
    training = InfoVLAConfig(
        **{**TRAINING, "output_dir": str(folder / "run"), "save_total_limit": CHECKPOINTS, "save_steps": 1},
        counterfactual_frames=stages + 1,  # one per past task at least
    )
    seconds: list[float] = []
    reference = yardstick()
    step: Callable[..., Any] = InfoVLATrainer.training_step

    def timed(trainer: Any, *args: Any, **options: Any) -> Any:
        start = time.process_time()
        loss = step(trainer, *args, **options)
        seconds.append((time.process_time() - start) / reference())
        return loss

    InfoVLATrainer.training_step = timed  # type: ignore[method-assign]
    notes = []
    stream = Stream(config, training)
    stream.stages = long_stages(stages)
    with stream:
        stream.record()
        stream.learn_base()
        stream.remember(stream.stages[0])
        stream.measure(stream.stages[0])
        for stage in stream.stages[1:]:
            seconds.clear()
            stream.learn(stage)
            stream.remember(stage)
            stream.measure(stage)
            gc.collect()
            sizes = {file.name: file.stat().st_size for file in (folder / "run" / "adapters" / stage.name).iterdir()}
            info = sizes.pop("infovla.json")  # lists the tasks learned so far
            cells = [stream.run_folder.cell(stage.index, task.name) for task in stream.seen(stage)]
            stage_files = filter(Path.is_file, stream.run_folder.stage(stage.index).rglob("*"))
            files = {file: file.stat().st_size for file in stage_files}
            notes.append(
                {
                    "bytes": resident_bytes(),
                    "handles": len(os.listdir("/proc/self/fd")),
                    "processes": processes(),
                    "threads": len(os.listdir("/proc/self/task")),
                    "step": statistics.median(seconds),
                    "adapter": sum(sizes.values()),
                    "info": info,
                    "cell": statistics.median(files.pop(cell) for cell in cells),
                    "stage": sum(files.values()),
                }
            )
    return notes


def main(folder: str, stages: int = STAGES) -> None:
    patch = pytest.MonkeyPatch()
    install_fakes(patch, Path(folder))
    notes = watch(Path(folder), stages)
    early, late = notes[SETTLED - 1 : SETTLED - 1 + WINDOW], notes[-WINDOW:]
    ratios = {
        name: statistics.median(note[name] for note in late) / statistics.median(note[name] for note in early)
        for name in notes[0]
        if name != "info"
    }
    assert (notes[-1]["info"] - notes[0]["info"]) / (stages - 1) <= LINE_PER_TASK
    print(" ".join(f"{name}={ratio:.3f}" for name, ratio in ratios.items()))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_stages_cost_as_much_as_five(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    print(last)
    ratios = {name: float(value) for name, value in (pair.split("=") for pair in last.split())}
    assert {name: ratio for name, ratio in ratios.items() if ratio > 1.05} == {}
