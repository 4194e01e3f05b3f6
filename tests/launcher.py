"""Two processes on the CPU, as a user starts them. Never forked: a fork of a process that has used torch can hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def launch_two(script: Path, *arguments: object, engine: str = "ddp") -> None:
    """`accelerate launch --config_file recipes/accelerate/ENGINE.yaml --num_processes 2 script arguments`, in float32.

    Accelerate starts several processes as if for GPUs; without one they meet over gloo. Their output is shown if they
    fail.
    """
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate" / f"{engine}.yaml")]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launch, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def shard_on_cpu() -> None:
    """Let Accelerate use FSDP on a CPU too, if launched for it: torch can, Accelerate asks for an accelerator."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def initialise(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        plugin = options.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = initialise  # type: ignore[method-assign]
