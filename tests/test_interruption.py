"""The end of `accelerate launch` reaches the process that it waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"
"""As accelerate's own launcher of one process."""
TRAINING = """
import os, sys, time
from pathlib import Path
from infovla_peft.interruption import deferred_stop, requested_stop, stop_signals

folder = Path(sys.argv[1])
with stop_signals(), deferred_stop():
    (folder / "ready").write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while requested_stop() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # in which a second signal would come
    (folder / "saving").write_text(str(requested_stop()))
(folder / "saving").rename(folder / "saved")
"""


def wait_for(file: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("together", [False, True])
def test_a_training_ends_its_step_when_its_launcher_is_stopped(tmp_path: Path, together: bool) -> None:
    (tmp_path / "accelerate").write_text(LAUNCHER)
    (tmp_path / "training.py").write_text(TRAINING)
    launcher = subprocess.Popen(
        [sys.executable, tmp_path / "accelerate", tmp_path / "training.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "ready")
    if together:  # as Ctrl-C on a terminal: the training first, and its launcher
        while not (process := (tmp_path / "ready").read_text()):
            time.sleep(0.01)
        os.kill(int(process), signal.SIGINT)
        time.sleep(0.1)
    launcher.terminate()
    launcher.wait()
    wait_for(tmp_path / "saved")
    assert int((tmp_path / "saved").read_text()) == (signal.SIGINT if together else signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.libero
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_launched_run_continues_after_sigterm_to_its_launcher(tmp_path: Path) -> None:
    from fault_runs import Run, prepare

    tests = Path(__file__).parent
    launcher = subprocess.Popen(
        [Path(sys.executable).with_name("accelerate"), "launch", "--num_processes", "1", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", tests / "launched_run.py", tmp_path],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tests}"},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(tmp_path / "ready", 300)
    launcher.terminate()
    launcher.wait()
    wait_for(tmp_path / "run" / "stages" / "stage_01" / "checkpoint-3")
    prepare(tmp_path)
    deadline = time.monotonic() + 60
    while (ended := Run(tmp_path / "run").finish()).code and time.monotonic() < deadline:
        assert "another process is using" in ended.said  # it is still ending
        time.sleep(0.2)
    assert ended.code == 0, str(ended)
    unbroken = Run(tmp_path / "unbroken")
    assert unbroken.finish().code == 0
    assert Run(tmp_path / "run").content() == unbroken.content()
