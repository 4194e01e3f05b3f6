"""The whole way of an adapter, by the commands of a user: train, push, list, load, roll out; processes share nothing.

With the marker `slow`, because a policy is trained and rolled out in the simulator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from huggingface_hub import HfApi
from tiny_run import add_results, build_run

REPO = "me/infovla-cycle"
RECIPE = """
suite: libero_goal
stream: B1-1N1
tasks: ["7", "1"]
base_model: tiny
assets: primitive
image_size: 56
demonstrations: 1
tiny_image_size: 56
tiny_patch_size: 14
tiny_vision_depth: 2
tiny_layers: 1
base_steps: 4
base_batch_size: 4
stage_steps: 4
per_device_train_batch_size: 4
lora_r: 4
method: infovla
memory_trajectories: 1
counterfactual_share: 0.0
eval_episodes: 2
rollout_max_steps: 16
videos_per_task: 1
eval_workers: 1
report_to: none
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Hub in a process of its own; the environment that commands are given."""
    server = serve(tmp_path / "hub")
    try:
        yield server[1]
    finally:
        server[0].terminate()
        assert server[0].wait(20) == 0


def serve(folder: Path) -> tuple[subprocess.Popen[str], dict[str, str]]:
    process = subprocess.Popen(
        [sys.executable, "tests/local_hub.py", "--port", "0", "--folder", str(folder)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = dict(process.stdout.readline().strip().removeprefix("export ").split("=", 1) for _ in range(3))
    process.stdout.close()
    return process, said


def infovla(*arguments: object, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "infovla_peft.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_pushed_is_there_when_the_server_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = []
    for first in (True, False):
        process, said = serve(tmp_path / "hub")
        try:
            api = HfApi(endpoint=said["HF_ENDPOINT"], token=said["HF_TOKEN"])
            if first:
                api.create_repo(REPO)
                api.upload_file(path_or_fileobj=b"kept", path_in_repo="notes.txt", repo_id=REPO)
            found.append((api.model_info(REPO).sha, api.list_repo_files(REPO)))
        finally:
            process.terminate()
            assert process.wait(20) == 0
    assert found[0] == found[1]
    assert "notes.txt" in found[1][1]


def test_the_lines_that_are_printed_are_all_that_a_push_needs(served: dict[str, str], tmp_path: Path) -> None:
    """In an environment without other settings of the client's, which uploads by Xet if it is not told otherwise."""
    add_results(build_run(tmp_path / "run"), report=False)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path / "home"), **served}
    command = [sys.executable, "-m", "infovla_peft.cli", "push", str(tmp_path / "run"), "--repo", REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"/{REPO}: commit " in done.stdout


@pytest.mark.slow
@pytest.mark.libero
def test_train_push_list_load_and_roll_out(served: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = tmp_path / "run"
    offline: dict[str, str] = {"HF_HUB_OFFLINE": "1"}
    online = {**served, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "empty")}

    infovla("train", tmp_path / "recipe.yaml", "--use_cpu", "true", "--output_dir", run, environment=offline)
    assert "commit" in infovla("push", run, "--repo", REPO, environment={**online, "HF_HOME": str(tmp_path / "mine")})

    listed = json.loads(infovla("list", REPO, "--json", environment=online))
    assert [(adapter["stage"], len(adapter["tasks"])) for adapter in listed] == [(1, 1)]
    assert not list((tmp_path / "empty").rglob("*.safetensors"))  # looked at without weights

    counts: dict[str, Any] = {}
    for name, policy, environment in (("before", run, offline), ("after", REPO, online)):
        output = tmp_path / name
        options = ("--episodes", 2, "--max_steps", 16, "--workers", 1, "--videos", 0, "--tasks", "7", "1")
        infovla("evaluate", policy, *options, "--output", output, environment=environment)
        results = json.loads((output / "evaluation.json").read_text())["results"]
        counts[name] = [(result["task"], result["successes"]) for result in results]
    assert counts["before"] == counts["after"]
    assert len(counts["after"]) == 2
    assert list((tmp_path / "empty").rglob("*.safetensors"))  # loaded out of the cache that was empty

    image = next(iter((run / "report").glob("*.png")))
    what = ("--images", image, "--proprio", *[0.1] * 8)
    task = listed[0]["tasks"][0]
    alone = {**online, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}  # from the cache, without a Hub
    actions = [
        json.loads(infovla("act", policy, "--task", task, *what, environment=environment))
        for policy, environment in ((run, offline), (REPO, online), (REPO, alone))
    ]
    assert actions[0] == actions[1] == actions[2]
