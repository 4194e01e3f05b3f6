"""A small run for `accelerate launch`: it waits in the third step of its first stage until its launcher is gone.

accelerate launch --num_processes 1 --cpu tests/launched_run.py <folder>
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from fault_runs import Run, at_step, prepare

from infovla_peft.cli import run_command

STEP = 3


def wait_for_the_launchers_end(ready: Path) -> None:
    launcher, deadline = os.getppid(), time.monotonic() + 120
    ready.touch()
    while os.getppid() == launcher and time.monotonic() < deadline:
        time.sleep(0.01)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    prepare(folder)
    at_step(STEP, lambda: wait_for_the_launchers_end(folder / "ready"))
    sys.exit(run_command(Run(folder / "run").go))
