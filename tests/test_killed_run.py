"""A run with everything real, by its command, killed in every kind of step: it ends as if nobody had.

The harness (fault_harness.py) kills small runs by the hundred, at random, but without simulator, report and Hub. Here
are the simulator, the figures and a Hub that answers over HTTP, and one kill in each step. With the marker `slow`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from test_hub_cycle import RECIPE, serve

from infovla_peft.integrity import sha256
from infovla_peft.verify import verify_run

STEPS = {
    "recording": "run/demonstrations/*/*.parquet",
    "learning the base": "run/stages/stage_00/checkpoint-*",
    "writing the base": "run/base",
    "a task's rollouts, their videos written": "run/videos/stage_00/*",
    "the report, results written": "run/results.json",
    "the report's figures": "run/report/*.png",
    "learning an adapter": "run/stages/stage_01/checkpoint-*",
    "between two tasks' rollouts": "run/stages/stage_01/rollouts/*.json",
    "pushing, some files uploaded": "hub/blobs/*",
}
"""What is going on -> the file or folder whose appearance says so."""


def start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "infovla_peft.cli", "train", "recipe.yaml", "--use_cpu", "true", "--output_dir", "run",
        "--save_steps", "2", "--push_to_hub", "true", "--hub_model_id", "me/killed",
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # it and its simulator processes are killed together, as by a machine that goes down
    )


def finish(folder: Path, environment: dict[str, str]) -> None:
    process = start(folder, environment)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def kill_when(folder: Path, environment: dict[str, str], pattern: str) -> bool:
    """Start the run and kill it as soon as something new appears; whether it did."""
    before = set(folder.glob(pattern))
    process = start(folder, environment)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and not set(folder.glob(pattern)) - before:
        time.sleep(0.002)
    reached = process.poll() is None and time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return reached


def outcome(folder: Path) -> dict[str, Any]:
    run = folder / "run"
    results = json.loads((run / "results.json").read_text())
    hub = json.loads((folder / "hub/hub.json").read_text())["repositories"]["me/killed"]
    pushed = hub["commits"][hub["branches"]["main"]]["files"]
    return {
        "adapters": {file.name: sha256(file) for file in run.glob("adapters/*/*.safetensors")},
        "demonstrations": {file.name: sha256(file) for file in run.glob("demonstrations/*/*.parquet")},
        "base": sha256(run / "base/model.safetensors"),
        "results": {name: value for name, value in results.items() if name not in ("timings", "sha256")},
        "pushed": sorted(pushed),
        "pushed weights": [pushed[name] for name in sorted(pushed) if name.endswith(".safetensors")],
    }


@pytest.mark.slow
@pytest.mark.libero
def test_a_run_killed_in_every_step_ends_as_if_nobody_had(tmp_path: Path) -> None:
    found = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE)
        server, said = serve(folder / "hub")
        environment = {**said, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
        try:
            if name == "killed":
                missed = [step for step, pattern in STEPS.items() if not kill_when(folder, environment, pattern)]
                assert not missed
            finish(folder, environment)
            assert verify_run(folder / "run").ok
            found.append(outcome(folder))
        finally:
            server.terminate()
            server.wait(20)
    whole, killed = found
    for part, expected in whole.items():
        assert killed[part] == expected, part
