"""Two processes on the CPU, as a user starts them. Never forked: a fork of a process that has used torch can hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch_two(script: Path, folder: Path) -> None:
    """`accelerate launch --multi_gpu --num_processes 2 script folder`; its output is shown if it fails.

    Accelerate starts several processes for `--multi_gpu` alone; without a GPU they meet over gloo.
    """
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
