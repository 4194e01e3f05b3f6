"""Recorded demonstrations: manifest, loading, refusals, and recording without a simulator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infovla_peft.data import recording
from infovla_peft.data.demonstrations import (
    ACTION_DIM,
    DemonstrationError,
    DemonstrationManifest,
    check_episode,
    load_demonstrations,
    read_start,
)
from infovla_peft.data.mapped import prepare_recorded
from infovla_peft.data.recording import RecordingError, RecordingSettings, record_episode
from infovla_peft.files import atomic_file
from infovla_peft.simulation.assets import AssetSet
from infovla_peft.simulation.demonstrator import Demonstration
from infovla_peft.simulation.environment import EnvironmentState
from infovla_peft.simulation.suites import Task

TASKS = [Task("libero_goal", index, name, name.replace("_", " "), Path("none")) for index, name in enumerate("ab")]
SETTINGS = RecordingSettings("primitive", "3.3.2", 16, ("agentview",), "fast", 0.1, seed=0)


class FakeEnvironment:
    """Stands still; the layout's seed decides whether the script succeeds and what is seen."""

    def __init__(self, task: Task) -> None:
        self.task, self.layout = task, 0

    def reset(self, *, seed: int) -> None:
        self.layout = seed


class FakeDemonstrator:
    """Fails on every third layout."""

    fails_always = False

    def __init__(self, environment: FakeEnvironment, *, noise: float) -> None:
        self.environment, self.noise = environment, noise

    def run(self, rng: np.random.Generator) -> Demonstration:
        layout = self.environment.layout
        frames = 4 + layout % 5
        actions = rng.uniform(-1, 1, (frames, ACTION_DIM)).astype(np.float32)
        return Demonstration(
            task=self.environment.task,
            start=EnvironmentState(np.array([0.1, layout / 7]), np.full((1, 7), 1 / 3)),
            images={"agentview": [np.full((16, 16, 3), (layout + frame) % 256, np.uint8) for frame in range(frames)]},
            states=rng.normal(size=(frames, 8)).astype(np.float32),
            actions=actions,
            executed_actions=actions + np.float32(self.noise),
            succeeded=np.arange(frames) >= 2,
            failure="it slipped" if layout % 3 == 0 or self.fails_always else "",
        )


@pytest.fixture(autouse=True)
def _no_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "Demonstrator", FakeDemonstrator)


def write(folder: Path, tasks: Sequence[Task] = TASKS, episodes: int = 3) -> DemonstrationManifest:
    """What `record_demonstrations` writes, in this process."""
    manifest = recording._open_manifest(folder, SETTINGS, tasks)
    schema = recording.demonstration_features(SETTINGS.cameras).arrow_schema
    for task in tasks:
        for index in range(episodes):
            episode = record_episode(FakeEnvironment(task), index, SETTINGS)  # type: ignore[arg-type]
            recording._write_episode(episode, folder, schema)
            manifest.tasks[task.name].episodes[index] = episode.record
    manifest.save(folder)
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "demonstrations")
    return tmp_path / "demonstrations"


def rewrite(path: Path, **columns: Any) -> None:
    """Replace columns of an episode's file."""
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path)


def test_manifest_round_trip_and_rates(folder: Path) -> None:
    manifest = DemonstrationManifest.load(folder)
    assert manifest.settings == SETTINGS
    assert list(manifest.tasks) == ["a", "b"]
    record = manifest.tasks["a"]
    assert sorted(record.episodes) == [0, 1, 2]
    assert record.attempts == sum(episode.attempts for episode in record.episodes.values()) >= 3
    assert record.first_try_success == 3 / record.attempts
    stored = json.loads((folder / "manifest.json").read_text())["tasks"]["a"]
    assert (stored["attempts"], stored["first_try_successes"]) == (record.attempts, 3)
    assert all(episode.seed % 3 for episode in record.episodes.values())  # only successes are kept


def test_an_episode_depends_on_seed_task_and_number_alone(folder: Path) -> None:
    again = record_episode(FakeEnvironment(TASKS[1]), 2, SETTINGS)  # type: ignore[arg-type]
    assert again.record == DemonstrationManifest.load(folder).tasks["b"].episodes[2]
    table = pq.read_table(folder / again.record.file)
    assert table["executed_action"].to_pylist() == again.columns["executed_action"]
    start = read_start(folder / again.record.file)
    np.testing.assert_array_equal(start.simulation, [0.1, again.record.seed / 7])  # to the last bit
    np.testing.assert_array_equal(start.fixtures, np.full((1, 7), 1 / 3))


def test_load_gives_tasks_and_episodes_in_order(folder: Path) -> None:
    frames = load_demonstrations(folder)
    assert frames["task"] == sorted(frames["task"])
    assert set(frames["episode_index"]) == {0, 1, 2}
    one = load_demonstrations(folder, ["b", "a"], episodes=1)
    assert list(dict.fromkeys(one["task"])) == ["b", "a"]
    assert set(one["episode_index"]) == {0}
    row = one[0]
    assert row["image"].size == (16, 16)
    assert len(row["action"]) == 7
    assert len(row["state"]) == 8
    assert row["instruction"] == "b"
    assert (row["frame_index"], row["done"], row["success"]) == (0, False, False)
    assert one[-1]["done"]
    assert one[-1]["success"]
    assert one.cache_files, "not memory-mapped"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: pq.write_table(pq.read_table(path).slice(0, 0), path), "holds 0 frames"),
        (lambda path: pq.write_table(pq.read_table(path).slice(0, 2), path), "holds 2 frames"),
        (lambda path: rewrite(path, action=[[0.0] * 14] * len(pq.read_table(path))), "14 dimensions, not 7"),
        (lambda path: rewrite(path, action=[[np.nan] * 7] * len(pq.read_table(path))), "action holds NaN"),
        (lambda path: rewrite(path, state=[[np.inf] * 8] * len(pq.read_table(path))), "state holds NaN or infinite"),
        (lambda path: pq.write_table(pq.read_table(path).drop(["state"]), path), "lacks the columns"),
        (lambda path: pq.write_table(pq.read_table(path).drop(["image"]), path), "lacks the columns"),
    ],
)
def test_a_broken_episode_gives_one_error_naming_the_file(folder: Path, damage: Any, message: str) -> None:
    path = folder / "a" / "episode_000001.parquet"
    damage(path)
    with pytest.raises(DemonstrationError, match=message) as error:
        load_demonstrations(folder)
    assert str(path) in str(error.value)
    load_demonstrations(folder, ["b"])  # the others are untouched


def test_missing_sets_tasks_and_episodes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="infovla demos"):
        load_demonstrations(tmp_path)
    with pytest.raises(DemonstrationError, match="no demonstrations of 'c'"):
        load_demonstrations(folder, ["c"])
    with pytest.raises(DemonstrationError, match="holds 3 demonstrations of 'a', not 5"):
        load_demonstrations(folder, ["a"], episodes=5)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 99}', "null"])
def test_a_broken_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DemonstrationError, match=r"manifest\.json"):
        load_demonstrations(folder)


def test_other_settings_are_not_mixed(folder: Path) -> None:
    other = RecordingSettings(**{**SETTINGS.__dict__, "assets": "official", "noise": 0.0})
    with pytest.raises(DemonstrationError, match="assets: primitive there, official wanted; noise"):
        recording._open_manifest(folder, other, TASKS)


def test_what_a_killed_recording_has_left_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is missing; what is written now, and what is prepared under another lock, stays."""
    left = [folder / ".manifest.p99-abc.tmp.json", folder / "a" / ".episode_000001.p99-x.tmp.parquet"]
    prepared = folder / ".cache" / ".a.p99-y.tmp.arrow"
    prepared.parent.mkdir()
    for file in (*left, prepared):
        file.write_bytes(b"half")
    monkeypatch.setattr(recording, "choose_gl", lambda: None)
    monkeypatch.setattr(recording, "libero_folder", lambda: folder)
    monkeypatch.setattr(recording, "version", lambda _: SETTINGS.mujoco)
    seen: list[bool] = []

    def prepare(_folder: Path, tasks: set[str]) -> None:
        seen.append(prepared.exists())
        prepare_recorded(_folder, tasks)

    monkeypatch.setattr(recording, "prepare_recorded", prepare)
    with atomic_file(folder / "living.json") as living:
        recording.record_demonstrations(
            TASKS, folder, episodes=3, assets=AssetSet("primitive", folder), image_size=16, seed=0, progress=False
        )
        assert living.exists()
        living.write_text("{}")
    assert seen == [True]
    assert [file for file in (*left, prepared) if file.exists()] == []
    assert len(load_demonstrations(folder)) > 0


def test_a_script_that_always_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDemonstrator, "fails_always", True)
    with pytest.raises(RecordingError, match="20 layouts of libero_goal/a in a row, last because: it slipped"):
        record_episode(FakeEnvironment(TASKS[0]), 0, SETTINGS)  # type: ignore[arg-type]


def test_what_is_recorded_is_not_recorded_again(folder: Path) -> None:
    record = DemonstrationManifest.load(folder).tasks["a"]
    assert recording._is_recorded(folder, record, 1)
    (folder / record.episodes[1].file).unlink()
    assert not recording._is_recorded(folder, record, 1)
    assert not recording._is_recorded(folder, record, 3)
    check_episode(folder / record.episodes[2].file, record.episodes[2].frames)
