"""A stream that learns from demonstrations that exist already, instead of recording scripted ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import FRAMES, write_lerobot, write_libero_hdf5
from stream_fakes import STREAM, TRAINING, install_fakes
from test_demonstrations import SETTINGS

from infovla_peft.config import InfoVLAConfig, StreamConfig, load_recipe
from infovla_peft.data.demonstrations import DemonstrationError, load_demonstrations
from infovla_peft.data.recorded import DemonstrationManifest
from infovla_peft.memory import ReplayMemory
from infovla_peft.run_folder import RunError, RunFolder
from infovla_peft.stream import Stream
from infovla_peft.verify import verify_run

pytestmark = pytest.mark.libero
TASKS = ["turn_on_the_stove", "put_the_bowl_on_the_plate"]


def stream(folder: Path, source: Path, **options: Any) -> Stream:
    chosen = {**STREAM, "stream": "B1-1N1", "tasks": TASKS, "demonstrations_source": str(source), **options}
    return Stream(StreamConfig(**chosen), InfoVLAConfig(**TRAINING, method="er", output_dir=str(folder)))


@pytest.fixture(autouse=True)
def _no_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = load_demonstrations
    install_fakes(monkeypatch, tmp_path)
    for module in ("stream", "probe"):
        monkeypatch.setattr(f"infovla_peft.{module}.load_demonstrations", real)

    def never(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("demonstrations were recorded although a source was given")

    monkeypatch.setattr("infovla_peft.data.recording.record_demonstrations", never)
    monkeypatch.setenv("INFOVLA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("write", [write_libero_hdf5, pytest.param(write_lerobot, marks=pytest.mark.slow)])
def test_a_stream_learns_from_files_that_exist(tmp_path: Path, write: Callable[..., Path]) -> None:
    source = write(tmp_path / "files", tasks=TASKS, episodes=2)
    with stream(tmp_path / "run", source) as run:
        assert f"2 tasks x 2, from {source}" in run.plan()
        run.run()
    assert len(list((tmp_path / "run" / "adapters").glob("*/adapter_model.safetensors"))) == 1
    assert not (tmp_path / "run" / "demonstrations").exists()
    found = verify_run(tmp_path / "run")
    assert found.ok, found.describe()
    assert RunFolder(tmp_path / "run").state()["demonstrations"]["folder"] is True
    memory = ReplayMemory.load(tmp_path / "run" / "memory")
    assert memory.tasks == TASKS
    assert len(memory) == 2 * FRAMES
    assert memory.frames is not None
    assert np.asarray(memory.frames[0]["image"]).shape == (32, 32, 3)


def test_what_is_missing_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    source = write_libero_hdf5(tmp_path / "files", tasks=TASKS[:1])
    with stream(tmp_path / "run", source) as run, pytest.raises(DemonstrationError, match="no demonstrations of"):
        run.run()
    write_libero_hdf5(source, tasks=TASKS)
    with stream(tmp_path / "more", source, demonstrations=3) as run, pytest.raises(DemonstrationError, match="not 3"):
        run.run()
    top = write_lerobot(tmp_path / "set", tasks=TASKS, cameras=("observation.images.top",))
    mapping = ["image=observation.images.top"]
    cameras = ["agentview", "robot0_eye_in_hand"]
    with (
        stream(tmp_path / "two", top, demonstrations_columns=mapping, cameras=cameras) as run,
        pytest.raises(RunError, match="no wrist_image, which `cameras` wants"),
    ):
        run.record()
    assert not list(tmp_path.glob("*/base"))


def test_recordings_with_other_assets_are_not_mixed_in(tmp_path: Path) -> None:
    source = tmp_path / "set"
    source.mkdir()
    DemonstrationManifest(replace(SETTINGS, assets="official")).save(source)
    with (
        stream(tmp_path / "run", source) as run,
        pytest.raises(RunError, match="assets: official there, primitive here"),
    ):
        run.record()


def test_options_of_a_source_come_from_the_recipe(tmp_path: Path) -> None:
    source = write_libero_hdf5(tmp_path / "files", tasks=TASKS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"stream: B1-1N1\ntasks: {TASKS}\ndemonstrations: 1\ndemonstrations_source: {source}\ndrop_noops: true\n"
        "demonstrations_columns: [image=obs/eye_in_hand_rgb, state=obs/ee_states, state=obs/gripper_states]\n"
        f"use_cpu: true\noutput_dir: {tmp_path / 'run'}\n"
    )
    config, training = load_recipe(recipe, ["--demonstrations_rotate", "false"])
    run = Stream(config, training)
    frames = run.demonstrations(run.tasks)
    assert len(frames) == 2 * (FRAMES - 1)
    plain = load_demonstrations(source, TASKS, 1)
    pictures = [np.asarray(row["wrist_image"])[::-1, ::-1] for row in plain]
    np.testing.assert_array_equal(np.asarray(frames[0]["image"]), pictures[0])
    np.testing.assert_array_equal(frames[0]["state"], plain[0]["state"])
    config, training = load_recipe(recipe, ["--demonstrations_gripper", "1", "-1"])
    turned = Stream(config, training).demonstrations(run.tasks)
    assert [row["action"][6] for row in turned] == [-row["action"][6] for row in frames]
    config, training = load_recipe(recipe, ["--demonstrations_observations", "after"])
    later = Stream(config, training).demonstrations(run.tasks)
    np.testing.assert_array_equal(later[0]["action"], plain[2]["action"])  # the second is a no-op
    np.testing.assert_array_equal(later[0]["state"], plain[1]["state"])


def test_options_without_a_source_are_refused() -> None:
    with pytest.raises(ValueError, match="drop_noops applies only with demonstrations_source"):
        StreamConfig(drop_noops=True)
    with pytest.raises(ValueError, match="demonstrations_observations applies only with demonstrations_source"):
        StreamConfig(demonstrations_observations="after")
    with pytest.raises(ValueError, match="demonstrations_gripper applies only with demonstrations_source"):
        StreamConfig(demonstrations_gripper=[1, 0])
    with pytest.raises(ValueError, match=r"demonstrations_source .* or demonstrations_folder"):
        StreamConfig(demonstrations_source="a", demonstrations_folder="b")
