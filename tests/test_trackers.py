"""Trackers: what a stage shows beside its loss curves, in TensorBoard as in JSON lines."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stream_fakes import STREAM, TRAINING, install_fakes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_policy import tiny_policy

from infovla_peft import trackers
from infovla_peft.config import InfoVLAConfig, StreamConfig
from infovla_peft.report import write_report
from infovla_peft.results import Results, TaskEntry, Video
from infovla_peft.stream import Stream
from infovla_peft.trackers import JsonlTracker, MediaTracker, TensorBoardTracker, stage_record
from infovla_peft.trainer import InfoVLATrainer
from infovla_peft.video import write_video


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A measured run of one stage, with a video of 100 frames."""
    results = Results(
        method="er", stream="B1-1N1", suite="libero_goal", seed=0, base_model="tiny", teacher=None,
        assets="primitive", renderer="fast", step_cap=300, open_loop_steps=8,
        tasks=[TaskEntry("a_task", "a task", 0), TaskEntry("b_task", "b task", 1)],
        versions={}, commit=None, config={},
    )  # fmt: skip
    video = "videos/base/a_task_00_failure.mp4"
    write_video(tmp_path / video, [np.full((32, 32, 3), 2 * frame, np.uint8) for frame in range(100)])
    results.add_stage(0, {"a_task": (3, 4)}, timings={}, videos=[Video(video, "a_task", 0, False)])
    results.save(tmp_path / "results.json")
    write_report(tmp_path)
    return tmp_path


def record(run: Path) -> trackers.StageRecord:
    return stage_record(Results.load(run / "results.json"), 0, run)


def test_json_lines(run: Path) -> None:
    for _ in range(2):  # measured again: one line
        JsonlTracker(run).log(record(run))
    (line,) = (run / "tracking.jsonl").read_text().splitlines()
    content = json.loads(line)
    assert content["scalars"]["success/a_task"] == content["scalars"]["success/mean"] == 0.75
    assert "success/b_task" not in content["scalars"]
    assert content["scalars"]["metrics/final_average"] == 0.75
    assert content["videos"] == {"a_task_00_failure": "videos/base/a_task_00_failure.mp4"}
    assert all((run / path).is_file() for path in content["images"].values())


def test_tensorboard_shows_scalars_matrix_and_rollouts(run: Path) -> None:
    TensorBoardTracker(run).log(record(run))
    events = EventAccumulator(str(run / "tensorboard" / "stream"), size_guidance={"images": 0})
    events.Reload()
    assert events.Scalars("success/a_task")[0].value == 0.75
    matrix = Image.open(io.BytesIO(events.Images("success_matrix")[0].encoded_image_string))
    with Image.open(run / "report" / "success_matrix.png") as drawn:
        assert matrix.size == drawn.size
    rollout: Any = Image.open(io.BytesIO(events.Images("rollouts/a_task_00_failure")[0].encoded_image_string))
    assert (rollout.format, rollout.n_frames, rollout.size) == ("GIF", 34, (32, 32))
    assert rollout.info["duration"] == 150  # three frames of 1/20 s in one


def test_media_go_to_wandb_and_trackio_as_their_own_types(run: Path) -> None:
    calls: list[Any] = []
    started = SimpleNamespace(finish=lambda: calls.append("run finished"))
    module = SimpleNamespace(
        __name__="wandb",
        run="of the curves",
        finish=lambda: calls.append("curves finished"),
        init=lambda **options: calls.append(options) or started,
        log=calls.append,
        Image=lambda path: ("image", path),
        Video=lambda path, format: ("video", path, format),
    )
    MediaTracker(module, {"project": "p"}).log(record(run))
    assert calls[:2] == ["curves finished", {"project": "p"}]
    assert calls[2]["success_matrix"] == ("image", str(run / "report" / "success_matrix.png"))
    assert calls[2]["rollouts/a_task_00_failure"][2] == "mp4"
    assert calls[3] == "run finished"


def test_a_stage_is_shown_where_trainer_shows_its_curves(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        fakes = {"run": None, "Image": str, "Video": lambda path, format: path, "log": lambda _content: None}
        fakes["init"] = lambda **options: started.append(options) or SimpleNamespace(finish=lambda: None)
        vars(module).update(fakes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: object())
    options = {"project": "p", "trackio_space_id": "me/space", "trackio_bucket_id": "me/bucket"}
    args = InfoVLAConfig(
        output_dir=str(run),
        use_cpu=True,
        report_to=["wandb", "trackio"],
        hub_private_repo=True,
        run_name="r",
        **options,
    )
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for tracker in trackers.make_trackers(args, run):
        tracker.log(record(run))
    monkeypatch.setenv("WANDB_PROJECT", "of the environment")
    for tracker in trackers.make_trackers(args, run):
        tracker.log(record(run))
    assert [start["project"] for start in started] == ["p", "p", "of the environment", "p"]
    assert {start["name"] for start in started} == {"r-stream"}
    assert "space_id" not in started[0]
    assert (started[1]["space_id"], started[1]["bucket_id"], started[1]["private"]) == ("me/space", "me/bucket", True)


def test_trainer_s_curves_go_where_the_stages_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "tensorboard" / "stage_01")
    for given, expected in (({}, (folder, "p")), ({"WANDB_PROJECT": "mine"}, (folder, "mine"))):
        for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT"):
            monkeypatch.delenv(name, raising=False)
            if name in given:
                monkeypatch.setenv(name, given[name])
        with trackers.curves_beside(tmp_path, "stage_01", "p"):
            assert (os.environ["TENSORBOARD_LOGGING_DIR"], os.environ["WANDB_PROJECT"]) == expected
        assert {
            name: os.environ[name] for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT") if name in os.environ
        } == given


def test_a_tracker_that_is_not_installed_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ImportError, match="trackio, which is not installed: pip install trackio"):
        trackers.check_trackers(["jsonl", "trackio"])


@pytest.mark.libero
def test_a_tracker_that_does_not_exist_is_named_before_anything_is_recorded(tmp_path: Path) -> None:
    training = InfoVLAConfig(**{**TRAINING, "report_to": ["jsonl", "tensorbord"]}, output_dir=str(tmp_path / "run"))
    with (
        pytest.raises(ValueError, match=r"'tensorbord', which is not a tracker; choose among jsonl, .*tensorboard"),
        Stream(StreamConfig(**{**STREAM, "stream": "B1-1N1"}), training),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_the_trainer_writes_json_lines(tmp_path: Path) -> None:
    tiny = tiny_policy(episodes=1, frames=4)
    args = InfoVLAConfig(
        **{**TRAINING, "report_to": "jsonl", "max_steps": 2, "save_steps": 9}, output_dir=str(tmp_path)
    )
    InfoVLATrainer(tiny.model, args, tiny.dataset, tiny.collator).train()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["policy_loss"] > 0 for line in lines)


@pytest.mark.libero
def test_a_stream_reports_curves_and_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fakes(monkeypatch, tmp_path)
    options = {**TRAINING, "report_to": ["tensorboard", "jsonl"], "method": "er", "output_dir": str(tmp_path / "run")}
    with Stream(StreamConfig(**{**STREAM, "stream": "B1-1N1"}), InfoVLAConfig(**options)) as stream:
        stream.run()
        names = [stage.name for stage in stream.stages]
    for name in names:
        curves = EventAccumulator(str(tmp_path / "run" / "tensorboard" / name))
        curves.Reload()
        assert len(curves.Scalars("train/loss")) == 3
    stages = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "stream"))
    stages.Reload()
    assert [event.step for event in stages.Scalars("success/mean")] == [0, 1]
    assert len((tmp_path / "run" / "tracking.jsonl").read_text().splitlines()) == 2
