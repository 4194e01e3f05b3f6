"""Two processes on the CPU, as a user starts them. Never forked: a fork of a process that has used torch can hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch_two(script: Path, folder: Path) -> None:
    """`accelerate launch --num_processes 2 script folder`; its error output is shown if it fails."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--cpu",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script), str(folder),
    ]  # fmt: skip
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
